from collections import Counter
from itertools import islice

import numpy as np
import pytest

from bench.simulator.requests import Media, Request, Text
from bench.simulator.workloads import MIXED, VGA, Gallery, Shape, gamma, illustrated, poisson, requests


def dice(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_poisson_arrivals_have_their_rate_and_variation() -> None:
    gaps = np.diff(list(islice(poisson(20.0, dice()), 40_000)))
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.02)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, rel=0.02)
    assert (gaps > 0).all()


@pytest.mark.parametrize("variation", [0.3, 3.0])
def test_gamma_arrivals_come_in_bursts_or_evenly_at_the_same_rate(variation: float) -> None:
    gaps = np.diff(list(islice(gamma(20.0, variation, dice()), 100_000)))
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)


@pytest.mark.parametrize(("rate", "variation"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_there_are_no_arrivals_without_a_rate(rate: float, variation: float) -> None:
    with pytest.raises(ValueError, match="no arrivals"):
        gamma(rate, variation, dice())


def test_a_gallery_without_a_catalogue_shows_nothing_twice_and_every_size_by_its_share() -> None:
    shown = Gallery(dice()).show(20_000)
    assert len({image.identity for image in shown}) == 20_000
    sizes = Counter((image.width, image.height) for image in shown)
    for size, share in MIXED.items():
        assert sizes[size] / 20_000 == pytest.approx(share, abs=0.01)


def test_a_catalogue_s_images_keep_their_size_and_are_as_popular_as_zipf_says() -> None:
    shown = Gallery(dice(), catalogue=1000, exponent=0.9).show(200_000)
    sizes: dict[str, set[tuple[int, int]]] = {}
    for image in shown:
        sizes.setdefault(image.identity, set()).add((image.width, image.height))
    assert all(len(found) == 1 for found in sizes.values())
    counts = Counter(image.identity for image in shown)
    assert len(counts) == 1000
    assert counts["c0"] / counts["c9"] == pytest.approx(10**0.9, rel=0.1)
    assert counts["c0"] / counts["c99"] == pytest.approx(100**0.9, rel=0.2)


@pytest.mark.parametrize("seed", range(8))
def test_the_most_popular_images_are_of_all_sizes(seed: int) -> None:
    few = Gallery(dice(seed), catalogue=10_000).show(50_000)
    popular = {image for image in few if int(image.identity[1:]) < 100}
    shares = Counter((image.width, image.height) for image in popular)
    for size, share in MIXED.items():
        assert shares[size] / 100 == pytest.approx(share, abs=0.03)


def test_a_gallery_of_one_size() -> None:
    assert {(i.width, i.height) for i in Gallery(dice(), {VGA: 1.0}).show(100)} == {VGA}
    with pytest.raises(ValueError, match="a size with a share"):
        Gallery(dice(), {VGA: 0.0})


def test_the_same_seed_makes_the_same_requests() -> None:
    def made(seed: int) -> list[tuple[float, Request]]:
        drawn = dice(seed)
        return list(islice(requests(poisson(5.0, drawn), Gallery(drawn, catalogue=50), drawn), 500))

    assert made(3) == made(3)
    assert made(3) != made(4)


def test_requests_have_the_shape_that_was_asked_for() -> None:
    drawn = dice()
    shape = Shape(images=(0, 3), text_tokens=(10, 20), output_tokens=(7, 7))
    made = list(requests(islice(poisson(5.0, drawn), 5000), Gallery(drawn), drawn, shape))
    assert len(made) == 5000
    assert Counter(len(request.media) for _, request in made).keys() == {0, 1, 2, 3}
    assert {request.text_tokens for _, request in made} == set(range(10, 21))
    assert {request.output_tokens for _, request in made} == {7}
    assert [at for at, _ in made] == sorted(at for at, _ in made)


def test_images_can_be_added_to_a_share_of_a_trace_of_text() -> None:
    text = Text(100, "t")
    source = [(float(n), Request((text,), 9)) for n in range(4000)]
    drawn = dice()
    made = list(illustrated(source, Gallery(drawn), drawn, share=0.25, images=(2, 4)))
    assert [at for at, _ in made] == [at for at, _ in source]
    assert all(request.parts[0] == text and request.output_tokens == 9 for _, request in made)
    shown = [request.media for _, request in made if request.media]
    assert len(shown) == pytest.approx(1000, rel=0.1)
    assert {len(media) for media in shown} == {2, 3, 4}
    assert isinstance(shown[0][0], Media)
