import orjson
import pytest

from bench.scripted import answers
from bench.scripted.client import Answer, Ending
from bench.scripted.verdict import Verdict, judge

TEXT = answers.text("q", 3)
EVENTS = [event + b"\n\n" for event in b"".join(answers.events("id", "q", 3)).split(b"\n\n") if event]
ERROR = b"data: " + orjson.dumps(answers.error("broke", 502)) + b"\n\n"


def stream(*events: bytes, status: int = 200, ending: Ending = Ending.COMPLETE) -> Verdict:
    answer = Answer(0.0, status, {}, b"".join(events), ending=ending)
    return judge(answer, TEXT, stream=True)


def whole(body: bytes, status: int = 200, ending: Ending = Ending.COMPLETE) -> Verdict:
    return judge(Answer(0.0, status, {}, body, ending=ending), TEXT, stream=False)


def test_whole_answers_are_served() -> None:
    assert stream(*EVENTS) is Verdict.SERVED
    assert stream(b": comment\r\n\r\n", *(event.replace(b"\n", b"\r\n") for event in EVENTS)) is Verdict.SERVED
    assert whole(orjson.dumps(answers.whole("id", TEXT, 3))) is Verdict.SERVED


@pytest.mark.parametrize(
    "events",
    [
        EVENTS[:-1],  # no [DONE]
        [*EVENTS[:-2], EVENTS[-1]],  # no finish_reason
        [*EVENTS[:2], *EVENTS[3:]],  # a token missing
        [*EVENTS[:2], *EVENTS[1:]],  # a token twice
        [],
        [b"<html></html>"],
        [EVENTS[1], EVENTS[1], ERROR],  # an error behind a doubled token
    ],
)
def test_success_that_is_not_the_answer_is_a_lie(events: list[bytes]) -> None:
    assert stream(*events) is Verdict.LIE


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b'{"choices":[]}', b'{"choices":[{}]}', b'{"error":{}}'])
def test_a_body_without_the_answer_is_a_lie(body: bytes) -> None:
    assert whole(body) is Verdict.LIE


def test_errors_are_honest_before_and_after_the_first_byte() -> None:
    assert whole(b"", 503) is stream(status=429) is Verdict.ERROR
    assert stream(*EVENTS[:3], ERROR) is Verdict.ERROR


def test_how_the_connection_ended_comes_first() -> None:
    assert stream(*EVENTS, ending=Ending.BROKEN) is Verdict.ABORT
    assert whole(b"", 0, Ending.HUNG) is Verdict.HUNG
    assert whole(b"", 0, Ending.LEFT) is Verdict.LEFT
