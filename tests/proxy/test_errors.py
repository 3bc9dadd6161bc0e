"""The error contract: what each failure looks like to a client, and what is kept of an engine's own words."""

import json
from typing import Any

import orjson
import pytest

from proxy import errors
from proxy.core import Stage
from proxy.errors import ProxyError, Refused, StageTimeout


def tree(cls: type[ProxyError]) -> list[type[ProxyError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in tree(sub))]


@pytest.mark.parametrize("cls", tree(ProxyError), ids=lambda cls: cls.__name__)
def test_every_error_has_every_field(cls: type[ProxyError]) -> None:
    error = Refused(500, b"", stage=Stage.DECODE) if cls is Refused else cls("why")
    body = json.loads(error.json())["error"]
    assert set(body) == {"message", "type", "param", "code", "stage", "retryable", "attempts"}
    assert 400 <= error.status <= 599 and body["message"] and body["type"] and body["attempts"] == 1
    assert cls.__name__ in (errors.__doc__ or ""), "the tree in the docstring is complete"


def test_a_class_sets_what_an_instance_does_not() -> None:
    error = StageTimeout("late", stage=Stage.PREFILL)
    assert (error.status, error.code, error.stage, error.retryable) == (504, "stage_timeout", "prefill", True)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b'{"error":{"message":"too long","type":"x","param":"messages","code":"ctx"}}', "too long"),
        (b'{"object":"error","message":"too long","type":"x","param":"messages","code":"ctx"}', "too long"),
        (b'{"detail":"too long"}', "too long"),
        (b'{"error":"too long"}', "too long"),
        (b"too long\n", "too long"),
        (b"", "the decode engine answered 400 and said nothing"),
        (b"[1]", "[1]"),
    ],
)
def test_an_engines_words_are_kept(answer: bytes, message: str) -> None:
    error = Refused(400, answer, stage=Stage.DECODE)
    assert (error.status, error.message, error.retryable, error.stage) == (400, message, False, "decode")
    if b"ctx" in answer:
        assert (error.type, error.param, error.code) == ("x", "messages", "ctx")


def test_an_engine_may_name_an_earlier_stage_and_its_own_retryable() -> None:
    answer = orjson.dumps({"error": {"message": "m", "stage": "prefill", "retryable": False, "code": "embedding_gone"}})
    error = Refused(502, answer, stage=Stage.DECODE)
    assert (error.stage, error.retryable, error.code) == ("prefill", False, "embedding_gone")
    assert Refused(429, b"", stage=Stage.DECODE).retryable
    assert Refused(302, b"", stage=Stage.DECODE).status == 502


@pytest.mark.parametrize("stage", [[], {}, 3, "kitchen", None])
def test_a_stage_that_is_none_is_not_believed(stage: Any) -> None:
    answer = {"error": {"message": "m", "stage": stage}}
    assert errors.within_200(answer, stage=Stage.DECODE).stage == "decode"


def test_words_may_be_anything_and_nested_as_deeply_as_json_may_be() -> None:
    deep = b"[" * 1000 + b"]" * 1000
    for answer in (deep, b'{"detail":' + deep + b"}", b'{"error":{"message":' + deep + b"}}"):
        assert Refused(500, answer, stage=Stage.DECODE).message
    nested = orjson.loads(b'{"error":{"x":' + b"[" * 500 + b"]" * 500 + b"}}")
    assert errors.within_200(nested, stage=Stage.DECODE).json()
    assert Refused(400, b'{"message":{"a":1}}', stage=Stage.DECODE).message == "{'a': 1}"


def test_an_error_event_keeps_its_code_as_status() -> None:
    assert errors.within_200({"error": {"message": "m", "code": 400}}, stage=Stage.DECODE).status == 400
    assert errors.within_200({"error": {"message": "m", "code": "odd"}}, stage=Stage.DECODE).status == 502
    assert errors.within_200({"error": "m"}, stage=Stage.DECODE).message == "m"


def test_the_last_event_of_a_broken_stream_is_one_event() -> None:
    event = ProxyError("line\nbreak").event()
    assert event.startswith(b"data: {") and event.endswith(b"}\n\n") and event.count(b"\n") == 2
