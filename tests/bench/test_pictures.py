import base64
import io
from random import Random

from PIL import Image

from bench.pictures import data_url, image_file, image_part, noise_file


def test_the_same_seed_draws_the_same_file_and_another_seed_another() -> None:
    assert image_file(seed=1) == image_file(seed=1) != image_file(seed=2)


def test_files_are_real_images_of_the_asked_format_and_size() -> None:
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        picture = Image.open(io.BytesIO(image_file(50, 30, format=format)))
        assert (picture.format, picture.size) == (format, (50, 30))


def test_a_part_carries_the_file_whole() -> None:
    data = image_file()
    part = image_part(data)
    assert part == {"type": "image_url", "image_url": {"url": data_url(data)}}
    assert base64.b64decode(data_url(data).partition(",")[2]) == data


def test_noise_has_the_size_that_is_asked_for_and_is_an_image() -> None:
    data = noise_file(100_000, Random(1))
    assert abs(len(data) - 100_000) < 1000
    Image.open(io.BytesIO(data)).load()
    assert data == noise_file(100_000, Random(1)) != noise_file(100_000, Random(2))
