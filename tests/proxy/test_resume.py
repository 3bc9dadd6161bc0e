"""Which streams may be continued, and how two of them become one for the client: byte for byte, over real sockets."""

from __future__ import annotations

from collections import deque
from typing import Any

import orjson
import pytest

from proxy import openai
from proxy.core import Api, Job, Order, Stage
from proxy.dialects.ascend import Ascend
from proxy.dialects.native import Native
from proxy.errors import Broken, GaveUp
from proxy.openai import Identity
from proxy.resume import Tape, TapedSink, eligible
from tests.fakes.deployment import Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, image, part
from tests.fakes.native import Engine

GREEDY: dict[str, Any] = {"stream": True, "temperature": 0}


BREAK = Broken("cut", stage=Stage.DECODE)
GAVE_UP = GaveUp("preempted", stage=Stage.DECODE)


def job(**fields: Any) -> Job:
    return openai.parse(orjson.dumps(chat(**fields)), Api.CHAT, "id", Identity())


def native_tape(**fields: Any) -> Tape:
    return Tape(job(**GREEDY | fields), Native(Order.DECODE_FIRST), True)


def ascend_tape(resumes: bool = False, **fields: Any) -> Tape:
    return Tape(job(**fields), Ascend(), resumes)


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
    tape = native_tape()
    shown = tape.feed(OPENING + said("Hel", 7) + said("", 8) + said("lo", 9))
    assert shown == OPENING + said("Hel") + said("lo"), "a token without text is no event for a client"
    assert (tape.token_ids, tape.usable(BREAK)) == ([7, 8, 9], True)


def test_the_second_stream_looks_like_the_first() -> None:
    tape = native_tape()
    tape.feed(OPENING + said("Hel", 7) + b'data: {"id":"a","cho')
    tape.cut(True)
    second = event(id="a-2", delta={"role": "assistant", "content": ""}, finish_reason=None)
    end = event(id="a-2", delta={}, finish_reason="stop")
    shown = tape.feed(second + said("lo", 8, id="a-2") + end + b"data: [DONE]\n\n")
    assert shown == said("lo") + event(delta={}, finish_reason="stop") + b"data: [DONE]\n\n"
    assert tape.asking(job(**GREEDY)).body["continue_token_ids"] == [7, 8]
    assert tape.finished and not tape.usable(BREAK)


def test_an_engine_that_tells_no_ids_cannot_be_continued() -> None:
    tape = native_tape()
    assert tape.feed(said("Hel")) == said("Hel")
    assert not tape.usable(BREAK)


@pytest.mark.parametrize(
    "odd",
    [
        *({"choices": 3}, {"choices": [3]}, {"choices": [{"delta": "x"}]}, {"choices": [{"text": 7}]}),
        *({"choices": [{"token_ids": 7}]}, {"prompt_token_ids": {}}, {"usage": []}, {"usage": {"prompt_tokens": None}}),
    ],
    ids=str,
)
def test_what_is_not_shaped_like_an_answer_passes_and_cannot_be_continued(odd: dict[str, Any]) -> None:
    tape, event = native_tape(), b"data: " + orjson.dumps(odd) + b"\n\n"
    assert tape.feed(said("Hel", 1) + event) == said("Hel") + event
    assert not tape.usable(BREAK)
    with pytest.raises(Broken):
        native_tape().whole(orjson.dumps({"choices": []} | odd))
    watching = ascend_tape(stream=True, n=2)
    given_up = b"data: " + orjson.dumps({**odd, "x": "recomputed"}) + b"\n\n"
    assert watching.feed(given_up) == given_up


@pytest.mark.parametrize("options", [{"stop": 3}, {"stop": [3, None]}, {"stream_options": [1]}])
def test_odd_options_are_the_engines_business(options: dict[str, Any]) -> None:
    tape = ascend_tape(resumes=True, temperature=0, **options)
    tape.feed(said("Hel", 1))
    tape.usable(BREAK)
    assert not tape.complete(job(**options))


def test_only_the_end_may_be_missing() -> None:
    plain, counted = job(**GREEDY), job(**GREEDY, stream_options={"include_usage": True})
    tape = native_tape()
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
    client, tape = Client(), native_tape()
    first = TapedSink(client, tape)
    first.begin("text/event-stream", {}, None, said("a", 1))
    tape.cut(True)
    second = TapedSink(client, tape)
    assert first.started and not second.started
    second.begin("text/event-stream", {}, None, said("b", 2))
    second.end()
    assert client.got == said("a") + said("b") + b"end"


# ---- an engine that gives up, and takes what goes on for a prompt


def unstreamed(text: str, ids: list[int], **fields: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text, "reasoning": "so"}, "token_ids": ids}
    end = {"finish_reason": "stop", "stop_reason": None} | fields
    usage = {"prompt_tokens": 3, "completion_tokens": len(ids), "total_tokens": 3 + len(ids)}
    return orjson.dumps({"id": "a", "choices": [choice | end], "usage": usage, "prompt_token_ids": [1, 2, 3]})


GIVEN_UP = {"finish_reason": "stop", "stop_reason": "recomputed"}
PROMPT = b'data: {"id":"a","prompt_token_ids":[1,2,3],"choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n'


def test_the_end_of_one_who_gives_up_is_not_shown() -> None:
    tape = ascend_tape(stream=True, max_tokens=9, min_tokens=1)
    shown = tape.feed(PROMPT + said("Hel", 7, 8) + event(delta={"content": ""}, **GIVEN_UP) + b"data: [DONE]\n\n")
    assert b"prompt_token_ids" not in shown and shown.endswith(said("Hel"))
    with pytest.raises(GaveUp):
        tape.check()
    assert tape.usable(GAVE_UP) and tape.gained and not tape.usable(BREAK), "--resume is another matter"
    tape.cut(True)
    body = tape.asking(job(stream=True, max_tokens=9, min_tokens=1)).body
    assert (body["max_tokens"], body["min_tokens"], body["return_token_ids"]) == (7, 0, True)
    assert body["kv_transfer_params"]["prompt_token_ids"] == [1, 2, 3, 7, 8]


def test_one_who_goes_on_after_other_tokens_is_not_believed() -> None:
    for told in ([1, 2, 3, 7], [1, 2, 3, 7, 9], None):
        tape = ascend_tape(stream=True)
        tape.feed(PROMPT + said("Hel", 7, 8) + event(delta={}, **GIVEN_UP))
        tape.cut(True)
        opening = orjson.loads(PROMPT[6:]) | {"prompt_token_ids": told}
        assert tape.feed(b"data: " + orjson.dumps(opening) + b"\n\n" + said("lo", 9)) == b""
        with pytest.raises(Broken, match="other tokens"):
            tape.check()


def test_usage_counts_what_was_said_as_said() -> None:
    tape = ascend_tape(stream=True)
    tape.feed(PROMPT + said("Hel", 7, 8) + event(delta={}, **GIVEN_UP))
    tape.cut(True)
    usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
    opening = PROMPT.replace(b"[1,2,3]", b"[1,2,3,7,8]")
    last = b"data: " + orjson.dumps({"id": "b", "choices": [], "usage": usage}) + b"\n\n"
    shown = tape.feed(opening + said("lo", 9, id="b") + event(delta={}, finish_reason="length") + last)
    assert shown.startswith(said("lo")), "no second opening, and the first one's id"
    assert orjson.loads(shown.rpartition(b"data: ")[2])["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
    }


def test_unstreamed_answers_become_one() -> None:
    tape = ascend_tape()
    with pytest.raises(GaveUp):
        tape.whole(unstreamed("Hel", [7, 8], stop_reason="recomputed"))
    assert tape.usable(GAVE_UP)
    tape.cut(True)
    rest = unstreamed("lo", [9]).replace(b"[1,2,3]", b"[1,2,3,7,8]")
    answer = orjson.loads(tape.whole(rest))
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Hello", "reasoning": "soso"}
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (1, 3)
    assert "token_ids" not in answer["choices"][0] and "prompt_token_ids" not in answer


@pytest.mark.parametrize(
    ("fields", "text", "may"),
    [
        ({}, "Hello", True),
        ({"temperature": 0.7}, "Hello", True),
        ({"temperature": 0.7, "seed": 3}, "Hello", False),
        ({"temperature": 0, "seed": 3}, "Hello", True),
        ({"stop": "END"}, "Hello", True),
        ({"stop": ["x", "lots"]}, "Hello", False),
        ({"stop": "lo"}, "Hel", False),
        ({"max_tokens": 1}, "Hello", False),
        ({"tools": [{"type": "function"}]}, "Hello", False),
        ({"n": 2}, "Hello", False),
        ({"return_token_ids": True}, "Hello", False),
    ],
)
def test_what_was_given_up_goes_on_only_where_that_is_exact(fields: dict[str, Any], text: str, may: bool) -> None:
    tape = ascend_tape(stream=True, **fields)
    tape.feed(PROMPT + said(text, 7) + event(delta={}, **GIVEN_UP))
    with pytest.raises(GaveUp):
        tape.check()
    assert tape.usable(GAVE_UP) is may


def test_an_answer_that_cannot_go_on_passes_unchanged_and_is_not_asked_for_tokens() -> None:
    tape = ascend_tape(stream=True, n=2, return_token_ids=True)
    assert tape.needed
    asked = job(stream=True, n=2)
    assert tape.asking(asked) is asked
    assert tape.feed(b'data: "recomputed"\n\n') == b'data: "recomputed"\n\n', "no event of ours"
    plain = PROMPT + said('"recomputed"', 7) + event(delta={}, finish_reason="stop", stop_reason="recomputed?")
    assert tape.feed(plain) == plain
    assert tape.whole(unstreamed("x", [1])) == unstreamed("x", [1])
    with pytest.raises(GaveUp):
        tape.whole(unstreamed("x", [1], **GIVEN_UP))


def test_an_answer_of_which_nothing_was_sent_can_begin_anew() -> None:
    tape = ascend_tape(seed=1)
    with pytest.raises(GaveUp):
        tape.whole(unstreamed("Hel", [7, 8], **GIVEN_UP))
    tape.cut(False)
    answer = orjson.loads(tape.whole(unstreamed("Hello", [7, 8, 9])))
    assert answer["choices"][0]["message"]["content"] == "Hello"
    assert answer["usage"]["completion_tokens"] == 3


def test_a_stream_that_breaks_goes_on_after_its_tokens_if_it_is_greedy() -> None:
    for fields, may in ((GREEDY, True), ({"stream": True, "temperature": 0.7, "seed": 3}, False)):
        tape = ascend_tape(True, **fields)
        tape.feed(PROMPT + said("Hel", 7))
        assert tape.usable(BREAK) is may


def test_a_stream_given_up_before_its_first_word_has_not_begun() -> None:
    client, tape = Client(), ascend_tape(stream=True)
    sink = TapedSink(client, tape)
    sink.begin("text/event-stream", {}, None, event(delta={"content": ""}, **GIVEN_UP))
    with pytest.raises(GaveUp):
        sink.end()
    assert sink.started and not client.started


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
