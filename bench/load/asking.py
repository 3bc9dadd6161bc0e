"""One request to an OpenAI-compatible URL: what came back, and when. Judges success, plans no load.

A stream has succeeded only if it ended as the protocol says: an error event, or an end without `[DONE]`, is a failure
whatever its status was.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import aiohttp
import orjson

from bench.load.questions import Question
from proxy.sse import DONE, Splitter

CHAT = "/v1/chat/completions"
_SAID = 200  # characters of an error's message


@dataclass(slots=True)
class Outcome:
    """Seconds; `due` is when it should have been sent, which all of them count from but `pauses`."""

    kind: str
    due: float
    first: float | None = None  # to the first content; None: there was none, or it was not streamed
    ended: float = 0.0
    pauses: list[float] = field(default_factory=list)  # between two pieces of content
    prompt_tokens: int = 0
    output_tokens: int = 0
    digest: int = 0  # of what was said; the same for the same words
    error: str = ""  # empty: served whole
    route: str = ""  # what Triptych says of its way

    @property
    def pace(self) -> float | None:
        """Seconds per output token after the first."""
        if self.first is None or self.output_tokens < 2:
            return None
        return (self.ended - self.first) / (self.output_tokens - 1)


class Broken(Exception):
    """The answer is not what the protocol says; the message says why."""


async def ask(session: aiohttp.ClientSession, url: str, question: Question, due: float) -> Outcome:
    """`url`: of the route. Whatever goes wrong is in the outcome."""
    outcome = Outcome(question.kind, due)
    try:
        async with session.post(url, data=question.body) as answer:
            outcome.route = answer.headers.get("x-triptych-route", "")
            if answer.status != 200:
                raise Broken(f"{answer.status} {_message(await answer.read())}")
            if answer.content_type == "text/event-stream":
                await _streamed(answer, outcome)
            else:
                _whole(await answer.read(), outcome)
    except Broken as error:
        outcome.error = str(error)
    except TimeoutError:
        outcome.error = "no end within --timeout"
    except (aiohttp.ClientError, OSError) as error:
        outcome.error = f"{type(error).__name__}: {error}"[:_SAID]
    outcome.ended = time.monotonic() - due
    return outcome


async def _streamed(answer: aiohttp.ClientResponse, outcome: Outcome) -> None:
    """Raises Broken."""
    splitter, last = Splitter(), 0.0
    async for chunk in answer.content.iter_any():
        now = time.monotonic() - outcome.due
        for event in splitter.feed(chunk):
            data = event.data
            if data == DONE:
                return
            if not data or not _content(data, outcome):
                continue
            if outcome.first is None:
                outcome.first = now
            else:
                outcome.pauses.append(now - last)
            last = now
    raise Broken("the stream ended without [DONE]")


def _content(data: bytes, outcome: Outcome) -> bool:
    """Whether the event brings some of the answer; its usage is noted. Raises Broken."""
    event = _object(data)
    _count(event, outcome)
    choices = event.get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    if any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls")):
        outcome.digest = crc32((delta.get("content") or "").encode(), outcome.digest)
        outcome.output_tokens += not event.get("usage")  # a token an event, until usage says better
        return True
    return False


def _whole(data: bytes, outcome: Outcome) -> None:
    """Raises Broken."""
    _count(_object(data), outcome)


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise Broken(f"not JSON: {data[:80]!r}") from None
    if not isinstance(found, dict) or found.get("error"):
        raise Broken(_message(data))
    return found


def _count(body: Mapping[str, Any], outcome: Outcome) -> None:
    usage = body.get("usage")
    if isinstance(usage, dict):
        outcome.prompt_tokens = usage.get("prompt_tokens") or 0
        outcome.output_tokens = usage.get("completion_tokens") or 0


def _message(data: bytes) -> str:
    try:
        found = orjson.loads(data)
        error = found.get("error", found)
        said = error.get("message", error) if isinstance(error, dict) else error
    except (orjson.JSONDecodeError, AttributeError):
        said = data.decode("utf-8", "replace")
    return " ".join(str(said).split())[:_SAID]


async def first_model(session: aiohttp.ClientSession, base: str) -> str:
    """The first model that is served at `base`. Raises Broken."""
    try:
        async with asyncio.timeout(10), session.get(f"{base}/v1/models") as answer:
            data = await answer.read()
            if answer.status != 200:
                raise Broken(f"{base}/v1/models answers {answer.status}: {_message(data)}")
        return str(_object(data)["data"][0]["id"])
    except (aiohttp.ClientError, OSError) as error:
        raise Broken(f"{base} cannot be reached: {error or 'no answer in time'}") from None
    except LookupError:
        raise Broken(f"{base}/v1/models names no model: say --model") from None
