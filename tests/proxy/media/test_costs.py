"""What an item costs, by what is known of it."""

from __future__ import annotations

import base64

from proxy.core import Handle, Item
from proxy.media import splice
from proxy.media.costs import Costs, OneVision
from proxy.media.formats import Shape
from proxy.media.splice import Media
from proxy.media.vision import DEFAULT, FAMILIES
from tests.fakes.media import image
from tests.support import containers


def held(data: bytes) -> Media:
    found = splice.digest(base64.b64encode(data), b"")
    assert found is not None
    return found


def told(costs: Costs, identity: str, modality: str, *grid: int) -> None:
    item = Item(0, 0, 0, modality, {}, None, identity, 1)
    costs.sizes.learn(item, Handle("hash", modality, {f"{modality}_grid_thw": list(grid)}, {}))


def test_an_image_costs_what_its_pixels_do() -> None:
    assert Costs().price(DEFAULT, "image", held(image(640, 480)), "") == DEFAULT.price(Shape("image", 1, 640, 480))


def test_a_header_behind_the_head_is_decoded_alone() -> None:
    data = containers.mp4((640, 480), 10, 250, index_last=500_000)
    assert Costs().price(DEFAULT, "video", held(data), "x") == DEFAULT.price(Shape("video", 1, 640, 480, 250, 10.0))


def test_a_url_costs_what_an_encoder_told() -> None:
    costs = Costs()
    assert costs.price(DEFAULT, "image", None, "http://h/a") == DEFAULT.price(None)
    told(costs, "http://h/a", "image", 1, 46, 80)
    assert costs.price(DEFAULT, "image", None, "http://h/a") == DEFAULT.price_of((1, 46, 80))


def test_of_a_video_an_encoder_knows_better() -> None:
    costs, film = Costs(), held(containers.mp4())
    told(costs, "film", "video", 3, 8, 8)
    assert costs.price(DEFAULT, "video", film, "film")[0] == 3 * 16


def test_one_vision_is_that_of_every_model() -> None:
    assert OneVision().of("m") is DEFAULT
    assert OneVision(FAMILIES["qwen3_vl"]).of("other") is FAMILIES["qwen3_vl"]
