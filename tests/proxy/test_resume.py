"""Which streams may be continued, and how two of them become one for the client: byte for byte, over real sockets."""

from __future__ import annotations

from collections import deque
from typing import Any

import orjson
import pytest

from proxy import openai
from proxy.core import Api, Job
from proxy.openai import Identity
from proxy.resume import Tape, TapedSink, eligible
from tests.fakes.deployment import Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, image, part
from tests.fakes.native import Engine

GREEDY: dict[str, Any] = {"stream": True, "temperature": 0}


def job(**fields: Any) -> Job:
    return openai.parse(orjson.dumps(chat(**fields)), Api.CHAT, "id", Identity())


@pytest.mark.parametrize(
    ("fields", "may"),
    [
        (GREEDY, True),
        (GREEDY | {"n": 1, "max_tokens": 5, "stop": ["x"]}, True),
        ({"stream": True, "temperature": 0.7, "seed": 3}, True),
        ({"stream": True, "temperature": 0.7}, False),
        ({"stream": True}, False),
        ({"temperature": 0}, False),
        (GREEDY | {"n": 2}, False),
        (GREEDY | {"logprobs": True}, False),
        (GREEDY | {"tools": [{"type": "function"}]}, False),
        (GREEDY | {"presence_penalty": 1.0}, False),
        (GREEDY | {"return_token_ids": True}, False),
        (GREEDY | {"continue_token_ids": [1]}, False),
    ],
)
def test_only_what_depends_on_its_tokens_alone_is_continued(fields: dict[str, Any], may: bool) -> None:
    assert eligible(job(**fields)) is may


def event(*ids: int, id: str = "a", **choice: Any) -> bytes:
    told = {"token_ids": list(ids)} if ids else {}
    value = {"id": id, "created": 1, "model": "m", "choices": [{"index": 0, **choice, **told}]}
    return b"data: " + orjson.dumps(value) + b"\n\n"


def said(text: str, *ids: int, id: str = "a") -> bytes:
    return event(*ids, id=id, delta={"content": text}, finish_reason=None)


OPENING = event(delta={"role": "assistant", "content": ""}, finish_reason=None)


def test_the_client_does_not_see_the_ids() -> None:
    tape = Tape()
    shown = tape.feed(OPENING + said("Hel", 7) + said("", 8) + said("lo", 9))
    assert shown == OPENING + said("Hel") + said("lo"), "a token without text is no event for a client"
    assert (tape.token_ids, tape.usable) == ([7, 8, 9], True)


def test_the_second_stream_looks_like_the_first() -> None:
    tape = Tape()
    tape.feed(OPENING + said("Hel", 7) + b'data: {"id":"a","cho')
    tape.cut()
    second = event(id="a-2", delta={"role": "assistant", "content": ""}, finish_reason=None)
    end = event(id="a-2", delta={}, finish_reason="stop")
    shown = tape.feed(second + said("lo", 8, id="a-2") + end + b"data: [DONE]\n\n")
    assert shown == said("lo") + event(delta={}, finish_reason="stop") + b"data: [DONE]\n\n"
    assert tape.asking(job(**GREEDY)).body["continue_token_ids"] == [7, 8]
    assert tape.finished and not tape.usable


def test_an_engine_that_tells_no_ids_cannot_be_continued() -> None:
    tape = Tape()
    assert tape.feed(said("Hel")) == said("Hel")
    assert not tape.usable


def test_only_the_end_may_be_missing() -> None:
    plain, counted = job(**GREEDY), job(**GREEDY, stream_options={"include_usage": True})
    tape = Tape()
    tape.feed(said("Hello", 7))
    assert not tape.complete(plain)
    tape.feed(event(delta={}, finish_reason="stop"))
    assert tape.complete(plain) and not tape.complete(counted)
    tape.feed(b'data: {"choices":[],"usage":{"prompt_tokens":1}}\n\n')
    assert tape.complete(counted)


class Client:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.started = False
        self.got = b""

    def begin(self, content_type: str, headers: Any, length: int | None, data: bytes) -> None:
        assert not self.started
        self.started = True
        self.got += data

    def write(self, data: bytes) -> None:
        self.got += data

    def end(self) -> None:
        self.got += b"end"

    sent = 0

    def chunk_writer(self) -> None:
        return None

    def throttle(self, pause: Any, resume: Any) -> None:
        """It takes everything at once."""


def test_an_answer_begins_once_over_all_attempts() -> None:
    client, tape = Client(), Tape()
    first = TapedSink(client, tape)
    first.begin("text/event-stream", {}, None, said("a", 1))
    tape.cut()
    second = TapedSink(client, tape)
    assert first.started and not second.started
    second.begin("text/event-stream", {}, None, said("b", 2))
    second.end()
    assert client.got == said("a") + said("b") + b"end"


# ---- over real sockets


def pair(d: Deployment, topology: str) -> list[Engine]:
    return [*d.combined] if "b" in topology else [*d.decodes]


BREAKS = [
    pytest.param(Fault(Kind.TRUNCATED, after=2), id="cut"),
    pytest.param(Fault(Kind.STALL, after=2), id="stall"),
    pytest.param(Fault(Kind.ERROR_EVENT, after=2), id="error-event"),
]


@pytest.mark.parametrize("fault", BREAKS)
@pytest.mark.parametrize(("topology", "handoff"), [("2b", "push"), ("1e1p2d", "push"), ("1e1p2d", "pull")])
async def test_a_broken_stream_goes_on_elsewhere_unseen(topology: str, handoff: str, fault: Fault) -> None:
    body = chat(*([part(image())] if "e" in topology else []), **GREEDY)
    async with deployment(topology, handoff, resume=True, stream_idle_timeout=0.3) as d:
        wanted = (await d.post(body, x_request_id="me")).body
        for engine in d.engines:
            engine.calls.clear()
        faults = deque([fault])  # for whoever is asked first
        for engine in pair(d, topology):
            engine.faults = faults
        answer = await d.post(body, x_request_id="me")
        assert answer.status == 200
        assert answer.body == wanted, "not a byte differs from an unbroken stream"
        calls = {call.id: call for engine in pair(d, topology) for call in engine.calls}
        assert set(calls) == {"me", "me-2"}
        assert all(len(engine.calls) == 1 for engine in pair(d, topology))
        assert calls["me-2"].body["continue_token_ids"] == [0, 1]
        for prefill in d.prefills:
            assert prefill.calls[-1].body["continue_token_ids"] == [0, 1], "their KV is computed, not decoded"
        assert [len(e.calls) for e in d.encoders] == [1] * len(d.encoders), "embeddings are used again"


async def test_a_stream_that_lacks_only_its_end_is_ended_here() -> None:
    async with deployment("1b", resume=True) as d:
        wanted = (await d.post(chat(**GREEDY), x_request_id="me")).body
        d.combined[0].fail(Fault(Kind.NO_DONE))
        assert (await d.post(chat(**GREEDY), x_request_id="me")).body == wanted
        assert len(d.combined[0].calls) == 2, "one each"


@pytest.mark.parametrize("fields", [{"stream": True}, GREEDY | {"n": 2}], ids=["dice", "n"])
async def test_where_it_cannot_be_exact_the_client_is_told(fields: dict[str, Any]) -> None:
    async with deployment("2b", resume=True) as d:
        for engine in d.combined:
            engine.fail(Fault(Kind.TRUNCATED, after=2))
        answer = await d.post(chat(**fields))
        assert b"[DONE]" not in answer.body and b'"error"' in answer.body
        assert sum(len(engine.calls) for engine in d.combined) == 1


async def test_nobody_left_to_go_on_is_told() -> None:
    async with deployment("2b", resume=True) as d:
        for engine in d.combined:
            engine.always = Fault(Kind.TRUNCATED, after=1)
        answer = await d.post(chat(**GREEDY))
        assert b"[DONE]" not in answer.body
        error = orjson.loads(answer.body.rstrip().rpartition(b"data: ")[2])["error"]
        assert (error["code"], error["stage"], error["attempts"]) == ("engine_broken", "decode", 2)
