"""One call of an SGLang language server for its embeddings, cut into one call per item. Pure: no I/O, no choice.

    what a server sends          "r_local_part_0" of 1: images A B C
    what real encoders get       "r_local_part_0" of 3: A    "r_local_part_1" of 3: B    "r_local_part_2" of 3: C

The receiver learns the number of parts from the first embedding that arrives, and joins embeddings in the order of
their parts (SGLang 0.5.10 to 0.5.23), so that whoever gets all its calls may number them anew. One item each, as an
encoder's cache knows a part by all of its items together, and because one item can then be tried again elsewhere.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from proxy.core import Item
from proxy.errors import BadRequest
from proxy.media import splice
from proxy.media.costs import Costs, Price
from proxy.media.splice import Cut, Media

_SUFFIX = "_local_part_"
_MODALITIES = ("image", "video", "audio")


@dataclass(frozen=True, slots=True)
class Part:
    """What `POST /encode` brought. `body` has all its fields, `tokens` and `work` the predicted ones of each item."""

    rid: str
    index: int
    count: int
    modality: str
    body: Mapping[str, Any]
    tokens: tuple[int, ...]
    work: tuple[int, ...]

    @property
    def rendezvous(self) -> bool:
        """The receivers tell where they are in calls of their own."""
        return self.body.get("embedding_port") is None


@dataclass(frozen=True, slots=True)
class Piece:
    """A body for a real encoder. `item` stands for its load; `index` is that of its item in the request's order."""

    index: int
    item: Item
    body: Mapping[str, Any]

    def blank(self) -> Piece | None:
        """The same with pictures that every encoder can read; None where there is none to put in."""
        if self.item.modality != "image":
            return None
        hashless = {name: value for name, value in self.body.items() if name != "hashes"}
        return Piece(self.index, self.item, {**hashless, "mm_items": [BLANK] * len(self.body["mm_items"])})


def request_of(req_id: str) -> str:
    """The request's own name in that of a part."""
    return req_id.rpartition(_SUFFIX)[0] or req_id


_PLAIN = Costs()


def read(raw: bytes | bytearray, costs: Costs = _PLAIN) -> Part:
    """Raises BadRequest. Takes a fraction of a millisecond per megabyte."""
    try:
        body, cuts = splice.loads(raw)
        if not isinstance(body, dict):
            raise BadRequest("the body must be a JSON object")
        items, prices = _items(body, cuts, costs)
        if any(isinstance(item, _Unread) for item in items):  # a string like no medium's: read all of it as plain JSON
            body = orjson.loads(raw)
            items, prices = _items(body, [], costs)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    req_id, index, count = body.get("req_id"), body.get("part_idx"), body.get("num_parts")
    if not isinstance(req_id, str) or not req_id:
        raise BadRequest("missing or invalid req_id", param="req_id")
    if type(index) is not int or type(count) is not int or not 0 <= index < count:
        raise BadRequest("part_idx must be in [0, num_parts)", param="part_idx")
    tokens, work = zip(*prices, strict=True)
    return Part(request_of(req_id), index, count, _modality(body), {**body, "mm_items": items}, tokens, work)


def cut(parts: Iterable[Part]) -> dict[int, list[Piece]]:
    """The pieces of each part by its index, one per item, numbered through `parts`: all that the request has."""
    ordered = sorted(parts, key=lambda part: part.index)
    total = sum(len(part.tokens) for part in ordered)
    found: dict[int, list[Piece]] = {}
    first = 0
    for part in ordered:
        found[part.index] = [_piece(part, n, first + n, total) for n in range(len(part.tokens))]
        first += len(part.tokens)
    return found


def whole(part: Part) -> Piece:
    """A part as it came, to one encoder."""
    return Piece(part.index, _item(part, part.index, sum(part.tokens), sum(part.work)), part.body)


def rank(item: Item) -> int:
    """Servers send images first, then videos, then audio: the key by which they order a request's items."""
    return _MODALITIES.index(item.modality)


def _piece(part: Part, n: int, index: int, total: int) -> Piece:
    body = {
        **part.body,
        "mm_items": [part.body["mm_items"][n]],
        "num_parts": total,
        "part_idx": index,
        "req_id": f"{part.rid}{_SUFFIX}{index}",
    }
    hashes = body.pop("hashes", None)
    if isinstance(hashes, list) and len(hashes) == len(part.tokens):
        body["hashes"] = [hashes[n]]
    return Piece(index, _item(part, index, part.tokens[n], part.work[n]), body)


def _item(part: Part, index: int, tokens: int, work: int) -> Item:
    return Item(index, 0, index, part.modality, {}, None, f"{part.rid}/{index}", tokens, work)


def _modality(body: Mapping[str, Any]) -> str:
    """Absent before 0.5.9, which knew images alone."""
    named = body.get("modality", "IMAGE")
    if not isinstance(named, str) or named.lower() not in _MODALITIES:
        raise BadRequest("missing or invalid modality", param="modality")
    return named.lower()


# ---- items


class _Unread:
    """A string that lost its end to a cut, and is no item."""


def _items(body: Mapping[str, Any], cuts: Sequence[memoryview], costs: Costs) -> tuple[list[Any], list[Price]]:
    items, modality, left = body.get("mm_items"), _modality(body), list(range(len(cuts)))
    vision = costs.visions.of("")  # these calls do not say for which model
    if not isinstance(items, list) or not items:
        raise BadRequest("missing or empty mm_items", param="mm_items")
    found, prices = [], []
    for item in items:
        url = item.get("url") if isinstance(item, dict) else item
        if not isinstance(url, str):
            raise BadRequest("an item is a string, or an object with a `url`", param="mm_items")
        hit = splice.find(url, list(cuts)) if cuts else None
        if hit is None:
            found.append(item)
            prices.append(costs.price(vision, modality, _here(url), url))
            continue
        number, prefix = hit
        if (held := splice.digest(cuts[number], b"")) is not None:
            left.remove(number)
        whole = Cut(prefix, cuts[number])
        found.append({**item, "url": whole} if isinstance(item, dict) else whole)
        prices.append(costs.price(vision, modality, held, ""))
    return ([_Unread()], []) if left else (found, prices)


def _here(url: str) -> Media | None:
    """Media that are in the string itself; None if they are elsewhere."""
    head, comma, text = url.partition(",")
    return splice.digest(text, b"") if comma and head.endswith(";base64") else None


def _black(side: int) -> str:
    """A black PNG of that many pixels each way, as a data URL."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack("!IIBBBBB", side, side, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(side * (1 + 3 * side))))
    png = b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


BLANK = _black(32)
