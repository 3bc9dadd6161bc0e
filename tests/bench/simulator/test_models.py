import pytest

from bench.simulator.models import (
    H100,
    QWEN2_5_VL_7B,
    QWEN3_VL_30B,
    Host,
    Linear,
    TowerOn,
    qwen2_5_vl,
    qwen3_vl,
)
from bench.simulator.requests import Media

SIZES = [(1280, 720), (1920, 1080), (2000, 2000), (3840, 2160), (4032, 3024)]


@pytest.mark.parametrize(
    ("tower", "tokens", "tera"),
    [
        (qwen2_5_vl(3584), (1196, 2691, 5041, 10549, 15552), (6.66, 16.3, 34.4, 91.1, 160)),
        (qwen3_vl(2048), (880, 2040, 3844, 8160, 11844), (4.66, 15.5, 43.1, 161.5, 321)),
    ],
)
def test_tokens_and_flops_are_those_of_the_released_models(tower, tokens, tera) -> None:
    found = [tower.tokens(*size) for size in SIZES]
    assert found == list(tokens)
    assert [tower.flops(count) / 1e12 for count in found] == pytest.approx(tera, rel=0.01)


def test_an_image_of_too_many_tokens_is_scaled_down() -> None:
    assert 16_000 < qwen3_vl(2048).tokens(20_000, 10_000) <= 16_384


def test_deepstack_sends_four_widths() -> None:
    assert qwen3_vl(2048).embedding_bytes() == 16_384
    assert qwen2_5_vl(3584).embedding_bytes() == 7168


def test_an_h100_encodes_as_fast_as_was_measured_there() -> None:
    vision = QWEN3_VL_30B.vision(H100)
    milliseconds = [vision.cost(Media("", *size)).gpu * 1e3 for size in SIZES[:4]]
    assert milliseconds == pytest.approx([12.9, 36.5, 98.6, 365.7], rel=0.1)


def test_two_frames_of_a_video_are_one_image_and_the_host_sees_each() -> None:
    vision = TowerOn(qwen2_5_vl(3584), H100, Host(0.0, 1.0))
    image, video = (vision.cost(Media("", 1000, 1000, frames=frames)) for frames in (1, 8))
    assert video.tokens == 4 * image.tokens
    assert video.host == 8 * image.host


def test_a_language_engine_is_linear_where_it_was_fit() -> None:
    language = QWEN2_5_VL_7B.language(H100, 1)
    assert isinstance(language, Linear)
    assert language.prefill(8192, 0) == pytest.approx(0.1886, rel=0.02)
    steps = [language.step(batch, batch * 4096)[0] * 1e3 for batch in (1, 16, 64)]
    assert steps == pytest.approx([6.0, 7.4, 11.4], rel=0.05)
    first, slope = language.step(10, 1000)
    assert language.step(10, 1010)[0] == pytest.approx(first + slope)


def test_nothing_is_guessed_of_hardware_that_nothing_is_known_of() -> None:
    with pytest.raises(KeyError):
        QWEN2_5_VL_7B.language(H100, 2)
