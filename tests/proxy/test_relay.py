"""What passes from an engine's stream to the client, chunk by chunk; nothing before it proves success."""

from __future__ import annotations

import itertools

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import Stage
from proxy.relay import StreamCheck, _is_chunks


def event(**delta: object) -> bytes:
    return b"data: " + orjson.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}) + b"\n\n"


ROLE, HI, END = event(role="assistant", content=""), event(content="hi"), b"data: [DONE]\n\n"
FINISH = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}\n\n'
ERROR = b'data: {"error":{"message":"boom","code":500}}\n\n'


def check() -> StreamCheck:
    return StreamCheck(Stage.DECODE)


def test_nothing_passes_before_content_and_then_everything() -> None:
    c = check()
    assert c.feed(b": ping\n\n" + ROLE) == b""
    assert c.feed(HI) == b": ping\n\n" + ROLE + HI
    assert c.feed(b": ping\n\n") == b": ping\n\n"
    assert c.feed(END) == END and c.done and c.error is None


@pytest.mark.parametrize(
    "proof",
    [
        HI,
        FINISH,
        event(tool_calls=[{"index": 0}]),
        event(reasoning_content="hm"),
        b'data: {"choices":[{"index":0,"text":"hi"}]}\n\n',
    ],
)
def test_what_proves_success(proof: bytes) -> None:
    assert check().feed(ROLE + proof) == ROLE + proof


@pytest.mark.parametrize("held", [ROLE, event(), event(content=None), b'data: {"choices":[],"usage":{}}\n\n', b"\n\n"])
def test_what_does_not(held: bytes) -> None:
    c = check()
    assert c.feed(held) == b"" and c.error is None


@pytest.mark.parametrize(
    ("stream", "says", "passed"),
    [
        (ROLE + ERROR + END, "boom", b""),
        (ROLE + HI + ERROR + END, "boom", ROLE + HI),
        (ROLE + END, "before any content", b""),
        (b"data: <html>\n\n", "not a JSON object", b""),
        (b"data: 3\n\n", "not a JSON object", b""),
        (b'data: {"choices":3}\n\n', "choices that are none", b""),
        (b'data: {"choices":[3]}\n\n', "choices that are none", b""),
        (b'data: {"choices":[{"delta":3}]}\n\n', "broke off", b""),
        (ROLE + HI, "broke off", ROLE + HI),
        (ROLE + HI + b"data: {", "broke off", ROLE + HI),
        (b"", "broke off", b""),
    ],
)
def test_failures_end_what_passes(stream: bytes, says: str, passed: bytes) -> None:
    c = check()
    out = c.feed(stream) if stream else b""
    if c.error is None:
        out += c.feed(b"")
    assert out == passed and says in str(c.error) and not c.done
    assert c.error is not None and c.error.retryable


def test_text_that_looks_like_protocol_is_text() -> None:
    tricky = [event(content='{"error": {"message": "x"}}'), event(content="data: [DONE]\n\n"), event(content="[DONE]")]
    c = check()
    assert c.feed(b"".join(tricky) + END) == b"".join(tricky) + END
    assert c.done and c.error is None


def test_a_null_error_field_is_no_error() -> None:
    stream = b'data: {"error":null,"choices":[{"text":"x"}]}\n\n'
    assert check().feed(stream) == stream


def test_a_stream_that_never_ends_an_event_is_broken() -> None:
    c = check()
    c._splitter._limit = 10
    c.feed(b"x" * 11)
    assert "no event ended" in str(c.error)


@given(st.lists(st.integers(0, 400), max_size=6))
def test_any_chunking_passes_the_same_bytes(cuts: list[int]) -> None:
    stream = ROLE + HI * 3 + FINISH + END
    bounds = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    c = check()
    passed = b"".join(c.feed(stream[a:b]) for a, b in itertools.pairwise(bounds))
    assert passed == stream and c.done


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@pytest.mark.parametrize("length", [1, 9, 10, 200, 3000, 70_000])
def test_whole_chunks_of_whole_events_are_known(length: int) -> None:
    one = chunk(event(content="x" * length))
    assert _is_chunks(one) and _is_chunks(one + chunk(HI) + one)


@pytest.mark.parametrize(
    "data",
    [
        chunk(HI)[:-1],
        chunk(HI) + b"5\r\n",
        chunk(HI) + b"0\r\n\r\n",
        b"0" + chunk(HI),
        chunk(HI).replace(b"\r\n", b";x\r\n", 1),
        b"0x" + chunk(HI),
        chunk(HI[:10]) + chunk(HI[10:]),
        chunk(HI) + b"ffff\r\n" + HI + b"\r\n",
        b"zz\r\n" + HI + b"\r\n",
        HI,
    ],
)
def test_anything_else_is_read(data: bytes) -> None:
    assert not _is_chunks(data)
