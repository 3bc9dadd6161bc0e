"""The error tree: what every class promises on the wire."""

from __future__ import annotations

import pytest

from engines import errors
from engines.errors import BadRequest, EngineError, Overloaded


def tree(root: type[EngineError]) -> list[type[EngineError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in tree(child))]


@pytest.mark.parametrize("kind", tree(EngineError))
def test_every_class_has_a_status_and_the_module_names_it(kind: type[EngineError]) -> None:
    assert 400 <= kind.status < 600
    assert kind.__name__ in (errors.__doc__ or "")
    assert str(kind.status) in (errors.__doc__ or "")
    assert kind("why").body("encode")["error"]["stage"] == "encode"


@pytest.mark.parametrize("kind", tree(BadRequest))
def test_a_bad_request_is_never_worth_a_retry(kind: type[EngineError]) -> None:
    assert kind.status < 500
    assert kind("no").retryable is False


def test_the_body_is_the_openai_shape() -> None:
    error = BadRequest("the image is broken", param="messages[0].content[1]", code="invalid_image")
    assert error.body("encode") == {
        "error": {
            "message": "the image is broken",
            "type": "invalid_request_error",
            "param": "messages[0].content[1]",
            "code": "invalid_image",
            "stage": "encode",
            "retryable": False,
        }
    }


def test_an_instance_overrides_stage_and_retryability() -> None:
    error = Overloaded("never fits", stage="prefill", retryable=False)
    assert error.body("decode")["error"]["stage"] == "prefill"
    assert error.body("decode")["error"]["retryable"] is False
    assert repr(error) == "Overloaded(503 overloaded: never fits)"


def test_a_shared_error_is_told_at_the_place_of_each_request() -> None:
    shared = Overloaded("no room", code="cache_full", retryable=False)
    error = shared.at("messages[0].content[2]")
    assert repr(error) == "Overloaded(503 cache_full: messages[0].content[2]: no room)"
    assert (error.param, error.retryable, shared.param) == ("messages[0].content[2]", False, None)
