import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.scripted.framing import LAST_CHUNK, Chunked, Sized, ToClose, body_of, chunk, parse_head


def fed(body: Chunked, data: bytes, cuts: list[int]) -> bytes:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return b"".join(body.feed(data[a:b]) for a, b in itertools.pairwise(edges))


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=5), st.lists(st.integers(0, 1000), max_size=6))
def test_chunks_cut_anywhere_give_their_payload(pieces: list[bytes], cuts: list[int]) -> None:
    body = Chunked()
    data = b"".join(map(chunk, pieces)) + LAST_CHUNK
    assert fed(body, data, cuts) == b"".join(pieces)
    assert body.done
    assert body.rest == b""


def test_what_follows_a_body_is_left_over() -> None:
    chunked, sized = Chunked(), Sized(3)
    assert chunked.feed(chunk(b"abc") + LAST_CHUNK + b"GET") == b"abc"
    assert sized.feed(b"abcGET") == b"abc"
    assert chunked.rest == sized.rest == b"GET"


def test_a_size_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        Chunked().feed(b"five\r\n")


def test_headers_say_how_a_body_is_framed() -> None:
    assert isinstance(body_of({"transfer-encoding": "Chunked"}, ToClose()), Chunked)
    assert body_of({"content-length": "0"}, ToClose()).done
    assert not body_of({}, ToClose()).done


def test_a_head_has_lower_case_names() -> None:
    assert parse_head(b"HTTP/1.1 200 OK\r\nX-A:  b: c ") == ("HTTP/1.1 200 OK", {"x-a": "b: c"})
