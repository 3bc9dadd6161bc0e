"""Parts of a server's request, cut into one call per item."""

from __future__ import annotations

import base64
import io
from typing import Any

import orjson
import pytest
from PIL import Image

from proxy.errors import BadRequest
from proxy.media import splice
from proxy.sglang import pieces
from tests.fakes.media import data_url, image

SMALL, WIDE = (data_url(image(width, 56)) for width in (56, 112))
PART: dict[str, Any] = {
    "encoder_idx": 0,
    "mm_items": [SMALL, WIDE],
    "num_parts": 1,
    "part_idx": 0,
    "req_id": "r_local_part_0",
    "modality": "IMAGE",
    "prefill_host": "192.0.2.2",
    "embedding_port": None,
}


def read(**changes: Any) -> pieces.Part:
    return pieces.read(orjson.dumps(PART | changes))


GOLDEN = {
    "0.5.10": PART | {"mm_items": [WIDE], "num_parts": 2, "part_idx": 1, "req_id": "r_local_part_1"},
    "0.5.23": PART
    | {"mm_items": [{"url": WIDE, "detail": "auto"}], "num_parts": 2, "part_idx": 1, "req_id": "r_local_part_1"}
    | {"encoder_url": "http://virtual", "time_stats_json": None},
}


@pytest.mark.parametrize("version", GOLDEN)
def test_what_a_real_encoder_gets(version: str) -> None:
    sent = {name: value for name, value in GOLDEN[version].items() if name in PART or version == "0.5.23"}
    whole = sent | {"num_parts": 1, "part_idx": 0, "req_id": "r_local_part_0"}
    whole["mm_items"] = [SMALL, *whole["mm_items"]]
    assert dict(pieces.cut([pieces.read(orjson.dumps(whole))])[0][1].body) == GOLDEN[version]


def test_a_part_is_read() -> None:
    part = read()
    assert (part.rid, part.index, part.count, part.modality, part.rendezvous) == ("r", 0, 1, "image", True)
    assert part.tokens == (4, 8), "the images' real sizes, in tokens"
    assert not read(embedding_port=[7]).rendezvous
    old = {name: value for name, value in PART.items() if name != "modality"} | {"req_id": "bare"}
    assert pieces.read(orjson.dumps(old)).rid == "bare", "before 0.5.9: images, and no number in the name"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mm_items": []}, "missing or empty mm_items"),
        ({"mm_items": "x"}, "missing or empty mm_items"),
        ({"mm_items": [7]}, "an item is a string"),
        ({"mm_items": [{"detail": "auto"}]}, "an item is a string"),
        ({"modality": "SMELL"}, "missing or invalid modality"),
        ({"modality": None}, "missing or invalid modality"),
        ({"req_id": ""}, "missing or invalid req_id"),
        ({"part_idx": 1}, r"part_idx must be in \[0, num_parts\)"),
        ({"part_idx": True, "num_parts": 2}, "part_idx must be"),
    ],
)
def test_a_part_that_is_none_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        read(**change)


UNREADABLE = b'{"mm_items":["data:image/png;base64,' + b"A" * 80_000 + b'\n"],"req_id":"r","num_parts":1,"part_idx":0}'


@pytest.mark.parametrize("raw", [b"{", b"[]", UNREADABLE], ids=["begun", "a list", "a line break in a cut"])
def test_what_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        pieces.read(raw)


def test_large_items_are_never_copied_and_come_out_as_they_went_in() -> None:
    picture = io.BytesIO()
    Image.effect_noise((400, 300), 80).save(picture, "PNG")
    large = data_url(picture.getvalue())
    raw = orjson.dumps(PART | {"mm_items": [large, {"url": large, "detail": "low"}]})
    part = pieces.read(raw)
    assert part.tokens == (14 * 11, 14 * 11)
    first, second = pieces.cut([part])[0]
    written = splice.dumps(first.body)
    assert isinstance(written, list), "in pieces, around the bytes that came in"
    assert orjson.loads(b"".join(written))["mm_items"] == [large]
    assert orjson.loads(b"".join(splice.dumps(second.body)))["mm_items"] == [{"url": large, "detail": "low"}]


def test_base64_that_is_no_item_is_left_where_it_is() -> None:
    text = "data:text/plain;base64," + base64.b64encode(bytes(100_000)).decode()
    part = read(note=text)
    assert part.body["note"] == text and part.body["mm_items"] == PART["mm_items"]


def test_parts_are_numbered_through_in_their_order() -> None:
    images, video = read(num_parts=2), read(num_parts=2, part_idx=1, modality="VIDEO", mm_items=["http://v"])
    found = pieces.cut([video, images])
    assert [[(p.body["part_idx"], p.body["num_parts"], p.index) for p in found[n]] for n in (0, 1)] == [
        [(0, 3, 0), (1, 3, 1)],
        [(2, 3, 2)],
    ]
    assert found[1][0].item.modality == "video"
    assert len({piece.item.identity for part in found.values() for piece in part}) == 3


def test_hashes_go_with_their_items_or_not_at_all() -> None:
    assert [piece.body["hashes"] for piece in pieces.cut([read(hashes=[1, 2])])[0]] == [[1], [2]]
    assert not any("hashes" in piece.body for piece in pieces.cut([read(hashes="all")])[0])


def test_a_whole_part_stays_as_it_came() -> None:
    part = read(num_parts=3, part_idx=2)
    piece = pieces.whole(part)
    assert dict(piece.body) == PART | {"num_parts": 3, "part_idx": 2}
    assert piece.item.tokens == 12


def test_a_blank_is_a_picture_that_every_encoder_reads() -> None:
    piece = pieces.whole(read(hashes=[1, 2])).blank()
    assert piece is not None and piece.body["mm_items"] == [pieces.BLANK] * 2 and "hashes" not in piece.body
    with Image.open(io.BytesIO(base64.b64decode(pieces.BLANK.partition(",")[2]))) as picture:
        picture.load()
        assert picture.size == (32, 32) and picture.mode == "RGB"
    assert pieces.whole(read(modality="AUDIO")).blank() is None
