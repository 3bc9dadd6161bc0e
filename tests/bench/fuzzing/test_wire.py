from contextlib import suppress

import orjson

from bench.fuzzing import wire
from proxy.http.framing import END, parse_head
from proxy.http.message import Head, HttpError
from tests.support.drawing import drawn


def test_requests_are_of_all_framings_and_some_are_none() -> None:
    heads: list[Head | None] = []
    for data in drawn(wire.requests(), 120):
        heads.append(None)
        with suppress(HttpError):
            heads[-1] = parse_head(data[: data.find(END) + 4])
    found = [head for head in heads if head is not None]
    assert None in heads and {head.length for head in found} >= {None, 0}
    assert {head.path for head in found} >= {"/health", "/metrics", "/v1/chat/completions"}


def test_answers_begin_with_a_status() -> None:
    answers = drawn(wire.answers())
    assert all(answer.startswith(b"HTTP/1.") for answer in answers)
    assert any(b"Transfer-Encoding: chunked" in answer for answer in answers)


def test_streams_come_to_their_end_more_often_than_not() -> None:
    ended = [stream.endswith(b"data: [DONE]\n\n") for stream in drawn(wire.streams(), 80)]
    assert 40 < sum(ended) < 80


def test_replies_are_json() -> None:
    replies = [orjson.loads(reply) for reply in drawn(wire.replies(), 100)]
    assert any(isinstance(reply, dict) and "error" in reply for reply in replies)
    assert any(isinstance(reply, dict) and "ec_transfer_params" in reply for reply in replies)
