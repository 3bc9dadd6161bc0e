"""HTTP both ways, nearly right, and what engines say in it."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from bench.fuzzing.nearly import ODD, maybe, some

# ---- what engines say


_IDS = st.lists(st.integers(0, 99), max_size=3)
_TEXT = st.text(max_size=5)
_delta = some(role=st.just("assistant"), content=_TEXT, tool_calls=st.just([]), reasoning_content=_TEXT)
_choice = st.fixed_dictionaries(
    {"index": maybe(st.just(0)), "delta": maybe(_delta)},
    optional={
        "text": maybe(_TEXT),
        "message": maybe(_delta),
        "token_ids": maybe(_IDS),
        "finish_reason": maybe(st.sampled_from(["stop", "length", None])),
        "stop_reason": ODD,
    },
)
_choices = maybe(st.lists(maybe(_choice), min_size=1, max_size=2))
_usage = some(prompt_tokens=st.integers(0, 9), completion_tokens=st.integers(0, 9), prompt_tokens_details=ODD)
_said = some(message=_TEXT, type=_TEXT, param=_TEXT, code=_TEXT, stage=st.just("decode"), retryable=st.booleans())
_error = st.one_of(_said, some(detail=st.just([{"loc": ["body"], "msg": "no"}])), _TEXT)
_metadata = some(image_grid_thw=st.just([[1, 4, 4]]))
_entry = st.fixed_dictionaries(
    {"metadata": maybe(_metadata), "item_indices": maybe(st.just([0]))},
    optional={"modality": maybe(st.just("image")), "transfer_id": ODD, "where": ODD, "num_tokens": ODD},
)
_handles = st.dictionaries(st.text(max_size=3), maybe(_entry), min_size=1, max_size=2)


def replies() -> SearchStrategy[bytes]:
    """Whole answers of engines, as JSON."""
    well = st.fixed_dictionaries(
        {
            "choices": _choices,
            "kv_transfer_params": maybe(st.just({"remote_engine_id": "a"})),
            "ec_transfer_params": maybe(_handles),
        },
        optional={"usage": maybe(_usage), "prompt_token_ids": maybe(_IDS), "id": ODD, "model": ODD},
    )
    ill = some(error=_error, detail=_error, message=_TEXT, choices=_choices)
    return maybe(st.one_of(well, well, ill)).map(orjson.dumps)


def streams() -> SearchStrategy[bytes]:
    """Event streams of engines, most of them to their end."""
    piece = st.fixed_dictionaries({"choices": _choices}, optional={"usage": maybe(_usage), "error": _error})
    data = maybe(piece).map(lambda value: b"data: " + orjson.dumps(value))
    other = st.sampled_from([b": ping", b"event: e", b"data", b"data:", b'data: {"error":{"message":"x"}}'])
    event = st.one_of(data, data, data, other)
    end = st.sampled_from([*[b"\n\n"] * 9, b"\r\n\r\n", b"\r\r", b"\n", b""])
    events = st.lists(st.tuples(event, end), max_size=5).map(lambda pairs: b"".join(a + b for a, b in pairs))
    return st.tuples(events, st.sampled_from([b"data: [DONE]\n\n"] * 3 + [b""])).map(b"".join)


# ---- HTTP


_NAMES = ("Content-Length", "Transfer-Encoding", "Connection", "Expect", "Content-Encoding", "Upgrade", "X-A", "Host")
_VALUES = (
    *(
        "a",
        "0",
        "5",
        "9" * 20,
        "-1",
        "chunked",
        "gzip, chunked",
        "close",
        "keep-alive",
        "100-continue",
        "gzip",
        "",
        "é",
    ),
)
_odd_fields = st.lists(st.tuples(st.sampled_from(_NAMES), st.sampled_from(_VALUES)), max_size=4)
_few_fields = st.lists(
    st.sampled_from([("X-A", "b"), ("Connection", "close"), ("x-request-id", "é"), ("Accept", "*/*")]), max_size=2
)
_fields = st.one_of(_few_fields, _few_fields, _few_fields, _odd_fields)
_ROUTES = ("GET /health", "GET /metrics", "POST /v1/chat/completions", "POST /v1/chat/completions")
_ODD_ROUTES = (
    *("GET /", "HEAD /health", "DELETE /instances", "PUT *", "get /health", "CONNECT a:80", "GET http://a/b", " /"),
    *("POST /v1/chat/completions?a=%zz&a=1", "GET /%00", "GET /" + "/" * 99, "OPTIONS *"),
)
_route = st.sampled_from([*_ROUTES * 6, *_ODD_ROUTES])
_version = st.sampled_from([*["1.1"] * 9, "1.0", "2.0", "1.1.1"])
_body = st.sampled_from(
    [b"", orjson.dumps({"messages": []}), orjson.dumps({"messages": [{"content": "x" * 99}]}), b"x\0"]
)


def _lines(fields: list[tuple[str, str]]) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in fields)


def _chunked(pieces: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece) + b"0\r\n\r\n"


def _message(first: str, fields: list[tuple[str, str]], pieces: list[bytes], framing: str) -> bytes:
    """With a body in one of three framings."""
    body = b"".join(pieces)
    if framing == "chunked":
        return f"{first}\r\n{_lines(fields)}Transfer-Encoding: chunked\r\n\r\n".encode() + _chunked(pieces)
    length = f"Content-Length: {len(body)}\r\n" if framing == "sized" else ""
    return f"{first}\r\n{_lines(fields)}{length}\r\n".encode() + body


def _messages(first: SearchStrategy[str], piece: SearchStrategy[bytes]) -> SearchStrategy[bytes]:
    framings = st.sampled_from(["sized", "sized", "chunked", "bare"])
    return st.builds(_message, first, _fields, st.lists(piece, max_size=2), framings)


def requests() -> SearchStrategy[bytes]:
    """One request after another."""
    first = st.builds("{} HTTP/{}\r\nHost: a".format, _route, _version)
    return st.lists(_messages(first, _body), min_size=1, max_size=3).map(b"".join)


def answers() -> SearchStrategy[bytes]:
    """What an engine may send back, interim answers first."""
    status = st.sampled_from([*[200] * 6, 204, 302, 400, 500, 999])
    first = st.builds("HTTP/{} {} x".format, st.sampled_from(["1.1", "1.1", "1.1", "1.0"]), status)
    interim = st.sampled_from([b"", b"", b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 x\r\na: b\r\n\r\n"])
    piece: SearchStrategy[Any] = st.one_of(streams(), replies(), st.binary(max_size=20))
    return st.tuples(interim, _messages(first, piece)).map(b"".join)
