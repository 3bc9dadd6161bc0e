"""Heads and chunks: what is taken, and all that two readers could understand in two ways and so is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.http.framing import Chunks, check_beginning, judged_head, parse_head
from proxy.http.message import Head, HttpError

HOST = b"Host: a\r\n"


def head(*lines: bytes, first: bytes = b"POST /x?q=1 HTTP/1.1", host: bytes = HOST) -> bytes:
    return first + b"\r\n" + host + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


def test_a_good_head() -> None:
    found = parse_head(head(b"X-A: 1", b"x-a:  2 ", b"Content-Length: 7", b"Expect: 100-continue"))
    assert (found.method, found.path, found.query, found.length) == ("POST", "/x", "q=1", 7)
    assert found.headers["x-a"] == "1, 2" and found.keep_alive and found.expects and not found.old
    assert parse_head(head(b"Transfer-Encoding: Chunked")).length is None
    assert not parse_head(head(b"Connection: close")).keep_alive
    old = parse_head(b"GET / HTTP/1.0\r\n\r\n")
    assert old.old and not old.keep_alive and old.length == 0


SMUGGLING = {
    "CL and TE": (head(b"Content-Length: 2", b"Transfer-Encoding: chunked"), 400),
    "TE and CL": (head(b"Transfer-Encoding: chunked", b"Content-Length: 2"), 400),
    "CL twice, equal": (head(b"Content-Length: 2", b"Content-Length: 2"), 400),
    "CL twice, different": (head(b"Content-Length: 2", b"Content-Length: 3"), 400),
    "CL list": (head(b"Content-Length: 2, 2"), 400),
    "CL with a sign": (head(b"Content-Length: +2"), 400),
    "CL negative": (head(b"Content-Length: -2"), 400),
    "CL hex": (head(b"Content-Length: 0x2"), 400),
    "CL empty": (head(b"Content-Length: "), 400),
    "CL two numbers": (head(b"Content-Length: 2 2"), 400),
    "CL overflow": (head(b"Content-Length: 99999999999999999999999"), 400),
    "CL huge": (head(b"Content-Length: 9999999999999999"), 413),
    "TE twice": (head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"), 400),
    "TE not last": (head(b"Transfer-Encoding: chunked, gzip"), 400),
    "TE more": (head(b"Transfer-Encoding: gzip, chunked"), 501),
    "TE unknown": (head(b"Transfer-Encoding: xchunked"), 400),
    "TE with a control byte": (head(b"Transfer-Encoding: \x0bchunked"), 400),
    "TE before its colon": (head(b"Transfer-Encoding : chunked"), 400),
    "TE in HTTP/1.0": (head(b"Transfer-Encoding: chunked", first=b"POST / HTTP/1.0"), 400),
    "obs-fold": (head(b"X: a", b" b"), 400),
    "obs-fold with a tab": (head(b"X: a", b"\tb"), 400),
    "NUL in a value": (head(b"X: a\0b"), 400),
    "NUL in a name": (head(b"X\0: b"), 400),
    "bare LF": (head(b"X: a\nY: b"), 400),
    "bare CR": (head(b"X: a\rY: b"), 400),
    "LF for the empty line": (b"POST / HTTP/1.1\r\nHost: a\r\n\nX: b\r\n\r\n", 400),
    "bad name": (head(b"X(: b"), 400),
    "no name": (head(b": b"), 400),
    "no colon": (head(b"X"), 400),
    "no host": (head(host=b""), 400),
    "two hosts": (head(b"Host: b"), 400),
    "a space in the target": (head(first=b"POST /a b HTTP/1.1"), 400),
    "a control byte in the target": (head(first=b"POST /\x01 HTTP/1.1"), 400),
    "HTTP/2": (head(first=b"POST / HTTP/2.0"), 505),
    "HTTP/0.9": (b"POST /\r\n\r\n", 505),
    "RTSP": (head(first=b"GET / RTSP/1.0"), 505),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\n", 505),
    "too many headers": (head(*(b"X%d: 1" % n for n in range(300))), 431),
}


@pytest.mark.parametrize(("data", "status"), SMUGGLING.values(), ids=SMUGGLING)
def test_what_is_refused(data: bytes, status: int) -> None:
    with pytest.raises(HttpError) as caught:
        parse_head(data)
    assert caught.value.status == status


@given(
    st.sampled_from(["GET", "POST"]),
    st.sampled_from(["/", "/v1/models", "/a?b=c&d=e?f", "/%41", "*"]),
    st.lists(
        st.tuples(
            st.sampled_from(
                ["Host", "host", "X-A", "Connection", "Content-Length", "Expect", "Transfer-Encoding", "Te"]
            ),
            st.sampled_from(["a", "close", "keep-alive, x", "5", "0005", "5 ", "a b  ", "100-continue", "chunked", ""]),
        ),
        max_size=5,
    ),
)
def test_a_plain_head_is_read_as_llhttp_reads_it(method: str, target: str, fields: list[tuple[str, str]]) -> None:
    lines = "".join(f"{name}: {value}\r\n" for name, value in [("Host", "h"), *fields])
    data = f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode()

    def read(parse: Callable[[bytes], Head]) -> Head | str:
        try:
            return parse(data)
        except HttpError as error:
            return str(error)

    assert read(parse_head) == read(judged_head)


def test_a_head_that_cannot_become_one_is_refused_before_its_end() -> None:
    check_beginning(b"POST / HTTP/1.1\r\nHo")
    with pytest.raises(HttpError):
        check_beginning(b"POST / HTTP/1.1\nHost: a\n\n")


@given(st.binary(max_size=80))
def test_any_bytes_are_a_head_or_an_http_error(data: bytes) -> None:
    try:
        parse_head(data + b"\r\n\r\n")
    except HttpError as error:
        assert 400 <= error.status < 600


# ---- chunks

BODY = b"5\r\nhello\r\nA;name=value\r\n0123456789\r\n0\r\nX-T: 1\r\n\r\n"


@given(st.lists(st.integers(0, len(BODY) + 4), max_size=8))
def test_chunks_read_the_same_however_they_are_cut(cuts: list[int]) -> None:
    stream = BODY + b"GET "
    bounds = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    chunks, later = Chunks(100), b""
    for a, b in itertools.pairwise(bounds):
        if chunks.done:
            later += stream[a:b]
        else:
            chunks.feed(stream[a:b])
    assert chunks.done and chunks.body == b"hello0123456789" and chunks.rest + later == b"GET "


@pytest.mark.parametrize(
    "data",
    [
        b"xyz\r\n",
        b"\r\n",
        b"0x2\r\nab\r\n",
        b"-2\r\n",
        b"+2\r\n",
        b"2 \r\nab\r\n",
        b" 2\r\nab\r\n",
        b"2\nab\r\n",
        b"2;a\nab\r\n",
        b"2;a\0b\r\nab\r\n",
        b"2;a\rb\r\nab\r\n",
        b"10000000000000002\r\n",
        b"2\r\nabX\r\n",
        b"2\r\nab\n0\r\n\r\n",
        b"2\r\nab\r0\r\n\r\n",
        b"0\r\nbad trailer\r\n\r\n",
        b"0\r\nX: \0\r\n\r\n",
        b"0\r\n X: folded\r\n\r\n",
        b"0\r\n\n",
        b"1" * 5000,
        b"0\r\n" + b"X: 1\r\n" * 5000,
    ],
)
def test_bad_chunks_are_refused(data: bytes) -> None:
    with pytest.raises(HttpError) as caught:
        Chunks(1 << 20).feed(data)
    assert caught.value.status == 400


def test_chunks_have_a_limit_which_their_sizes_tell() -> None:
    chunks = Chunks(10)
    chunks.feed(b"8\r\n12345678\r\n")
    with pytest.raises(HttpError) as caught:
        chunks.feed(b"3\r\n")
    assert caught.value.status == 413


def test_what_was_read_is_not_copied_for_each_chunk() -> None:
    """What arrives at once may be ten thousands of chunks: cutting each off would take a second of the loop's time."""

    class Watched(bytes):
        copied = 0

        def __getitem__(self, at: Any) -> Any:
            found = super().__getitem__(at)
            Watched.copied += len(found)
            return found

        def __radd__(self, before: bytes) -> bytes:
            return Watched(before + bytes(self))

    data = Watched(b"1\r\na\r\n" * 10_000)
    chunks = Chunks(1 << 20)
    chunks.feed(data)
    assert len(chunks.body) == 10_000 and 0 < Watched.copied <= 2 * len(data)
