"""The splitter: where the stream is cut must not matter, and no byte may change."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.sse import DONE, EventTooLong, Splitter

pieces = st.sampled_from(
    [b"data: x", b"data:y", b": ping", b"event: e", b"\n", b"\r\n", b"\r", b"data", b"\xc3\xb6", b""]
)
streams = st.lists(pieces, max_size=24).map(b"".join)


def split(chunks: list[bytes]) -> tuple[list[bytes], bytes]:
    splitter = Splitter()
    raws = [event.raw for chunk in chunks for event in splitter.feed(chunk)]
    raws += [event.raw for event in splitter.end()]
    return raws, splitter.rest


@given(streams, st.data())
def test_any_chunking_gives_the_same_events(stream: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    bounds = [0, *cuts, len(stream)]
    chunks = [stream[a:b] for a, b in itertools.pairwise(bounds)]
    assert split(chunks) == split([stream]) == split([bytes([byte]) for byte in stream])


@given(streams)
def test_no_byte_is_lost_or_changed(stream: bytes) -> None:
    raws, rest = split([stream])
    assert b"".join(raws) + rest == stream


@pytest.mark.parametrize("eol", [b"\n", b"\r\n", b"\r"])
def test_data_of_every_line_ending(eol: bytes) -> None:
    splitter = Splitter()
    stream = eol.join([b": hi", b"data: a", b"data:b", b"data", b"datax: no", b"", b"data: [DONE]", b"", b""])
    events = [*splitter.feed(stream), *splitter.end()]
    assert [event.data for event in events] == [b"a\nb\n", DONE]


def test_a_byte_order_mark_is_not_data() -> None:
    (event,) = Splitter().feed(b"\xef\xbb\xbfdata: x\n\n")
    assert event.data == b"x" and event.raw.startswith(b"\xef")


def test_an_event_comes_as_soon_as_its_blank_line() -> None:
    splitter = Splitter()
    assert splitter.feed(b"data: a\n") == []
    assert [event.raw for event in splitter.feed(b"\ndata")] == [b"data: a\n\n"]
    assert splitter.rest == b"data"


def test_a_stream_without_events_is_bounded() -> None:
    splitter = Splitter(limit=8)
    splitter.feed(b"data: 1\n")
    with pytest.raises(EventTooLong, match="8 bytes"):
        splitter.feed(b"2")
