"""Cutting and splicing: whatever the body, what is read and written is what plain JSON would have been."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy import openai
from proxy.core import Api
from proxy.errors import BadRequest
from proxy.media import splice
from proxy.openai import Identity

BIG = base64.b64encode(bytes(range(256)) * 300).decode()
URL = "data:image/png;base64," + BIG


def joined(body: Any) -> bytes:
    data = splice.dumps(body)
    return b"".join(data) if isinstance(data, list) else data


def image(url: Any = URL) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"detail": "low", "url": url, "x": 1}, "y": [2]}


def chat(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {"z": 0, "messages": [{"role": "user", "content": list(parts)}], **fields}


def parsed(raw: bytes | bytearray) -> openai.Job:
    return openai.parse(raw, Api.CHAT, "id", Identity())


def plain(raw: bytes) -> openai.Job:
    """As if nothing were ever large."""
    large, splice.LARGE = splice.LARGE, 1 << 60
    try:
        return parsed(raw)
    finally:
        splice.LARGE = large


@pytest.mark.parametrize(
    "body",
    [
        chat(image()),
        chat(image(), {"type": "text", "text": "x"}, image(), image(URL.replace("png", "gif"))),
        chat({"type": "image_url", "image_url": URL}),
        chat({"image_url": URL}),
        chat({"type": "input_audio", "input_audio": {"data": BIG, "format": "wav"}}),
        chat({"type": "input_audio", "input_audio": BIG}),
        chat(image(), {"type": "input_audio", "input_audio": {"format": "wav", "data": BIG}}),
    ],
)
def test_media_leave_the_body_and_come_back(body: dict[str, Any]) -> None:
    raw = orjson.dumps(body)
    job, expected = parsed(raw), plain(raw)
    assert joined(job.body) == raw == joined(expected.body)
    assert [(i.mm_hash, i.identity, i.tokens, i.param) for i in job.items] == [
        (i.mm_hash, i.identity, i.tokens, i.param) for i in expected.items
    ]
    assert [joined(item.content) for item in job.items] == [joined(item.content) for item in expected.items]


def test_large_media_are_never_copied() -> None:
    raw = bytearray(orjson.dumps(chat(image())))
    pieces = splice.dumps(parsed(raw).items[0].content)
    assert isinstance(pieces, list)
    (view,) = (piece for piece in pieces if isinstance(piece, memoryview))
    assert view.obj is raw and sum(map(len, pieces)) - len(view) < 300


@pytest.mark.parametrize(
    "raw",
    [
        orjson.dumps(chat(image())).replace(b"/", b"\\/"),
        orjson.dumps(chat(image(URL + "!"))),
        orjson.dumps(chat(image(URL[:-2]))),
        orjson.dumps(chat({"type": "text", "text": "see " + URL})),
        orjson.dumps(chat({"type": "text", "text": URL}, image())),
        orjson.dumps(chat({"data": BIG})),
        orjson.dumps(chat(image(), data=BIG)),
        orjson.dumps(chat(**{URL: 1})),
        orjson.dumps(chat(image(URL.replace("data:", "x:")))),
        orjson.dumps(chat(image(URL.replace(",", ",,")))),
        b'{"messages":[{"content":[{"image_url":{"url":"%s"}}],"content":"last"}]}' % URL.encode(),
        orjson.dumps(chat(image())).replace(b'"url":"', b'"url" : \n "'),
        orjson.dumps(chat({"type": "input_audio", "input_audio": {"data": BIG}})).replace(b'"data":', b'"data" :\t'),
    ],
)
def test_what_is_unusual_is_read_as_it_would_be_plainly(raw: bytes) -> None:
    job, expected = parsed(raw), plain(raw)
    assert orjson.loads(joined(job.body)) == orjson.loads(raw)
    assert [i.mm_hash for i in job.items] == [i.mm_hash for i in expected.items]


@pytest.mark.parametrize(
    "raw",
    [
        orjson.dumps(chat(image()))[:-1],
        orjson.dumps(chat(image())) + b"}",
        b'{"messages":[],"x";base64,%s"}' % BIG.encode(),
        orjson.dumps(chat(image(), image_embeds=URL)),
        orjson.dumps(chat({"type": URL + "_embeds"})),
    ],
)
def test_mistakes_are_told_as_plainly_too(raw: bytes) -> None:
    with pytest.raises(BadRequest) as told:
        parsed(raw)
    with pytest.raises(BadRequest) as expected:
        plain(raw)
    assert told.value.body() == expected.value.body()
    assert splice._NONCE not in str(told.value.body())


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(max_size=6)
    | st.sampled_from([URL, BIG, "data:;base64," + BIG, ";base64,", "\\/", '"', URL + "\n", "data", BIG + "="])
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["data", "a", URL]), inner, max_size=3),
    max_leaves=8,
)
media = st.builds(image, st.sampled_from([URL, "https://h/x", URL[:-1], "data:,x", URL + "é"]))


@settings(max_examples=150, deadline=None)
@given(st.lists(media | values, max_size=3), st.dictionaries(st.text(max_size=3), values, max_size=2), st.booleans())
def test_any_body_reads_as_orjson_reads_it(parts: list[Any], fields: dict[str, Any], spaced: bool) -> None:
    raw = orjson.dumps(fields | chat(*parts, pad="x" * splice.LARGE), option=orjson.OPT_INDENT_2 if spaced else 0)
    try:
        expected = plain(raw)
    except BadRequest as error:
        with pytest.raises(BadRequest) as told:
            parsed(raw)
        assert told.value.body() == error.body()
        return
    job = parsed(raw)
    assert orjson.loads(joined(job.body)) == orjson.loads(raw)
    assert list(job.body) == list(expected.body)
    assert [(i.mm_hash, i.tokens, joined(i.content)) for i in job.items] == [
        (i.mm_hash, i.tokens, joined(i.content)) for i in expected.items
    ]


@given(st.text("AB+/=-_ \n", max_size=12) | st.binary(max_size=9).map(lambda data: base64.b64encode(data).decode()))
def test_base64_is_strict(text: str) -> None:
    try:
        expected = binascii.a2b_base64(text, strict_mode=True)
    except (binascii.Error, ValueError):
        expected = None
    found = splice.decode(text)
    assert found in (None, expected), "stricter is safe, laxer is not"


@given(st.binary(max_size=400), st.integers(0, 420), st.integers(0, 60), st.sampled_from([str, bytes, memoryview]))
def test_media_are_decoded_anywhere(data: bytes, start: int, count: int, form: Any) -> None:
    text = base64.b64encode(data)
    found = splice.digest(text.decode() if form is str else form(text), b"")
    assert found is not None and found.nbytes == len(data)
    assert found.at(start, count) == data[start : start + count]


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(TypeError):
        splice.dumps({"a": object()})
