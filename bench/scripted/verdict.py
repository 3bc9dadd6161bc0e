"""What an answer was to its client: whole, an honest error, a visible abort, a lie, or nothing at all.

Judged by the bytes alone, by what a client of OpenAI's API would make of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any

import orjson

from bench.scripted.client import Answer, Ending

_DONE = "[DONE]"


class Verdict(StrEnum):
    SERVED = "served"  # all of the answer, once, to its end
    ERROR = "error"  # an error status, or an error event at the end of a stream
    ABORT = "abort"  # the connection broke, and the client's library says so
    LIE = "lie"  # success to the end, but not the answer: something is missing, doubled, foreign or no answer at all
    HUNG = "hung"  # no end within the client's patience
    LEFT = "left"  # the client hung up itself


_BY_ENDING = {Ending.BROKEN: Verdict.ABORT, Ending.HUNG: Verdict.HUNG, Ending.LEFT: Verdict.LEFT}


def judge(answer: Answer, expected: str, *, stream: bool) -> Verdict:
    """`expected` is the text of the whole answer."""
    if answer.ending is not Ending.COMPLETE:
        return _BY_ENDING[answer.ending]
    if answer.status >= 400:
        return Verdict.ERROR
    if not stream:
        return Verdict.SERVED if answer.status == 200 and _text(answer.body) == expected else Verdict.LIE
    return _of_stream(answer, expected)


def _of_stream(answer: Answer, expected: str) -> Verdict:
    said, finished, done = "", False, False
    for data in _events(answer.body):
        if data == _DONE:
            done = True
            continue
        event = _object(data)
        if event.get("error"):
            # What was said before it stands, and must be a beginning of the answer.
            return Verdict.ERROR if expected.startswith(said) else Verdict.LIE
        delta, ends = _delta(event)
        said += delta
        finished = finished or ends
    whole = said == expected and finished and done
    return Verdict.SERVED if answer.status == 200 and whole else Verdict.LIE


def _events(body: bytes) -> Iterator[str]:
    for block in body.decode(errors="replace").replace("\r\n", "\n").split("\n\n"):
        lines = [line[5:].strip() for line in block.split("\n") if line.startswith("data:")]
        if lines:
            yield "\n".join(lines)


def _text(body: bytes) -> str | None:
    choices = _object(body).get("choices")
    try:
        content = choices[0]["message"]["content"] if choices else None
    except (LookupError, TypeError):
        return None
    return content if isinstance(content, str) else None


def _delta(event: Mapping[str, Any]) -> tuple[str, bool]:
    """The text an event adds, and whether it ends the answer."""
    choices = event.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    delta = choice.get("delta") or {}
    return delta.get("content") or "", bool(choice.get("finish_reason"))


def _object(data: bytes | str) -> Mapping[str, Any]:
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError:
        return {}
    return parsed if isinstance(parsed, dict) else {}
