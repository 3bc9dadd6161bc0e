"""Priority and deadline, from a body or a header."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy import openai
from proxy.core import Api, Job
from proxy.errors import BadRequest
from proxy.intake import wishes
from proxy.openai import Identity
from tests.fakes.media import chat


def job(headers: dict[str, str] | None = None, **fields: Any) -> Job:
    return openai.parse(orjson.dumps(chat(**fields)), Api.CHAT, "id", Identity(), headers)


@pytest.mark.parametrize(
    ("headers", "fields", "found"),
    [
        ({}, {}, 0),
        ({}, {"priority": -3}, -3),
        ({"x-priority": "7"}, {}, 7),
        ({"x-priority": "7"}, {"priority": 1}, 1),
        ({"x-priority": "high"}, {}, 0),
        ({}, {"priority": None}, 0),
        ({}, {"priority": [1]}, 0),
    ],
)
def test_a_priority_is_a_number_and_the_bodys_comes_first(
    headers: dict[str, str], fields: dict[str, Any], found: int
) -> None:
    assert wishes.priority(job(headers, **fields)) == found


def test_a_deadline_is_seconds() -> None:
    assert wishes.seconds(job()) is None
    assert wishes.seconds(job({"x-request-timeout": "2.5"})) == 2.5
    for text in ("", "soon", "0", "-1", "inf", "nan"):
        with pytest.raises(BadRequest):
            wishes.seconds(job({"x-request-timeout": text}))


def test_a_target_for_the_first_token_is_seconds() -> None:
    assert wishes.first_token(job()) is None
    assert wishes.first_token(job({"x-ttft-target": "0.25"})) == 0.25
    with pytest.raises(BadRequest, match="x-ttft-target must be a number of seconds"):
        wishes.first_token(job({"x-ttft-target": "never"}))
