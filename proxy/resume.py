"""Going on with an answer that its engine did not finish: who may, and what makes two answers one.

An engine that is asked for it tells the tokens behind each piece of its answer, and another goes on after them: same
text, same finish, same usage. An engine may have died, or given the answer up in good order (vLLM-Ascend, of a sequence
that it has no memory for). Where going on would not be exact, the client is told. It sees one answer, without the ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import orjson

from proxy.core import Body, Job, Stage
from proxy.dialects.base import Dialect
from proxy.errors import Broken, GaveUp, ProxyError
from proxy.relay import Sink
from proxy.sse import DONE, Event, Splitter

ASK = "return_token_ids"
CONTINUE = "continue_token_ids"

# Each makes the rest of an answer depend on more than its tokens so far, or the events carry more than text.
_INEXACT = (
    "tools",
    "functions",
    "logprobs",
    "top_logprobs",
    "presence_penalty",
    "frequency_penalty",
    "response_format",
    "structured_outputs",
    "echo",
    "use_beam_search",
)
_SHARED = ("id", "created", "model")

# Types of what is looked at here of an answer, and of its choices; anything may be missing or null.
_ANSWER: Mapping[str, type] = {"prompt_token_ids": list, "choices": list, "usage": dict}
_CHOICE: Mapping[str, type] = {
    "delta": dict,
    "message": dict,
    "text": str,
    "token_ids": list,
    "prompt_token_ids": list,
}


def continuable(job: Job) -> bool:
    """Whether the answer that `job` asks for is one text whose rest depends on its tokens so far."""
    body, prompt = job.body, job.body.get("prompt")
    several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
    return (
        body.get("n") in (None, 1)
        and not several
        and not any(body.get(name) for name in _INEXACT)
        and not body.get(ASK)
        and CONTINUE not in body
    )


def eligible(job: Job) -> bool:
    """Whether the stream that `job` asks for could be continued exactly after it broke: the lost rest comes again."""
    deterministic = job.body.get("temperature") == 0 or isinstance(job.body.get("seed"), int)
    return job.stream and deterministic and continuable(job)


class Tape:
    """What of an answer has been said: its tokens, and how to make later pieces look as the first ones.

    One that keeps no tokens only watches for an engine that gives up.
    """

    def __init__(self, job: Job, dialect: Dialect, resumes: bool) -> None:
        """`resumes`: a stream that breaks may be continued too."""
        self.dialect = dialect
        self._job = job
        self._resumes = resumes and eligible(job) and not (dialect.continues_as_prompt and _seeded(job))
        takes_over = dialect.given_up is not None and continuable(job) and not _seeded(job)
        self._keeps = self._resumes or takes_over
        self._mark = None if dialect.given_up is None else f'"{dialect.given_up}"'.encode()
        self.prompt_ids: list[int] = []  # where the engine tells them
        self.token_ids: list[int] = []
        self.finished = False  # its last token is there, and maybe its usage
        self._said: dict[str, str] = {}  # the texts so far, by their field
        self._exact = True  # every piece of text came with its tokens
        self._given_up = False
        self._error: ProxyError | None = None
        self._first: dict[str, Any] | None = None
        self._before = 0  # tokens of earlier answers
        self._confirmed = True  # the present answer is known to go on after `_before`
        self._has_usage = False
        self._passed = False  # the client has been shown something
        self._splitter = Splitter()

    @property
    def needed(self) -> bool:
        """Whether an answer to this job has to pass here at all."""
        return self._keeps or self._mark is not None

    def usable(self, error: ProxyError) -> bool:
        """Whether another engine can go on where this answer stands after `error`."""
        if not (self._resumes or (self._keeps and isinstance(error, GaveUp))):
            return False
        return self._exact and bool(self.token_ids) and not self.finished and self._continued(self._job) is not None

    @property
    def gained(self) -> bool:
        """Whether the present answer got further than the one that it continues."""
        return len(self.token_ids) > self._before

    def complete(self, job: Job) -> bool:
        """Whether nothing but the stream's end is missing."""
        options = job.body.get("stream_options")
        return self.finished and (self._has_usage or not (isinstance(options, dict) and options.get("include_usage")))

    def asking(self, job: Job) -> Job:
        """`job` as the engine gets it: told to name its tokens, and from where to go on."""
        if not self._keeps:
            return job
        body = self._continued(job) if self._before else self.dialect.recorded(job)
        return job if body is None else replace(job, body=body, raw=b"")

    def _continued(self, job: Job) -> Body | None:
        if self.dialect.continues_as_prompt and _may_stop_within(job, "".join(self._said.values())):
            return None
        return self.dialect.continued(job, self.prompt_ids, self.token_ids)

    def cut(self, goes_on: bool) -> None:
        """The answer ended early; what comes next continues it, or takes its place: nothing of it was sent."""
        self._splitter = Splitter()
        self._given_up, self._error = False, None
        if not goes_on:
            self.token_ids, self._said, self._first, self._exact, self.finished = [], {}, None, True, False
        self._before = len(self.token_ids)
        self._confirmed = not (self._before and self.dialect.continues_as_prompt)

    # ---- what passes

    def feed(self, data: bytes) -> bytes:
        """Whole events, as the client is to see them. Half an event is held, and lost with the stream it is from."""
        shown = b"".join(self._seen(event) for event in self._splitter.feed(data))
        if self._given_up and not self._passed and not (self._keeps and self.token_ids):
            return b""  # nothing was said: another answer may take its place
        self._passed = self._passed or bool(shown)
        return shown

    def check(self) -> None:
        """The stream is over. Raises GaveUp, or Broken if it does not go on where the one before ended."""
        if self._error is not None:
            raise self._error
        if self._given_up:
            raise GaveUp("the decode engine gave the request up before its end", stage=Stage.DECODE)

    def whole(self, data: bytes) -> bytes:
        """An unstreamed answer with what earlier ones said. Raises as `check`."""
        if not self._keeps:
            self._watch(data)
            self.check()
            return data
        answer = orjson.loads(data)
        if not _shaped(answer):
            raise Broken("the decode engine's answer has fields of other types than an answer's", stage=Stage.DECODE)
        for choice in answer["choices"]:
            self._take(choice, choice.get("message"))
        self._note(answer)
        self.check()
        for choice in answer["choices"]:
            choice |= {"message": choice["message"] | self._said} if "message" in choice else self._said
        return orjson.dumps(self._alike(answer))

    def _seen(self, event: Event) -> bytes:
        if self._given_up or self._error is not None:
            return b""
        data = event.data
        if not data or data == DONE:
            return event.raw
        if not self._keeps:
            self._watch(data)
            return b"" if self._given_up else event.raw
        parsed = _object(data)
        if parsed is None or not _shaped(parsed):
            self._exact = False
            return event.raw
        choices = parsed.get("choices") or []
        shown = [choice for choice in choices if self._take(choice, choice.get("delta"))]
        self._note(parsed)
        self._has_usage = self._has_usage or bool(parsed.get("usage"))
        if self._error is not None or (choices and not shown):
            return b""
        parsed["choices"] = shown
        return b"data: " + orjson.dumps(self._alike(parsed)) + b"\n\n"

    def _watch(self, data: bytes) -> None:
        """Look for a choice that was given up, in JSON that is nobody's business otherwise."""
        if self._mark is not None and self._mark in data:
            found = _object(data)
            choices = found["choices"] if found and _shaped(found) and found.get("choices") else ()
            self._given_up = any(choice.get("stop_reason") == self.dialect.given_up for choice in choices)

    def _take(self, choice: dict[str, Any], said: dict[str, Any] | None) -> bool:
        """Note a choice's tokens and take them out of it; False if nothing is left to show."""
        ids = choice.pop("token_ids", None)
        self._read_prompt(choice.pop("prompt_token_ids", None))
        text, finish = _text(choice, said), choice.get("finish_reason")
        if ids:
            self.token_ids += ids
        elif text:
            self._exact = False
        for name, value in text.items():
            self._said[name] = self._said.get(name, "") + value
        if self._mark is not None and choice.get("stop_reason") == self.dialect.given_up:
            self._given_up = True
            choice["finish_reason"] = choice["stop_reason"] = None
            return bool(text)
        self.finished = self.finished or bool(finish)
        opens = said is not None and "role" in said and not self._before
        return bool(text or finish or opens)

    def _note(self, event: dict[str, Any]) -> None:
        if self._first is None:
            self._first = {name: event[name] for name in _SHARED if name in event}
        self._read_prompt(event.pop("prompt_token_ids", None))
        if not self._confirmed and self._error is None and event.get("choices"):
            self._error = Broken("the engine went on after other tokens than those it was told", stage=Stage.DECODE)

    def _read_prompt(self, ids: list[int] | None) -> None:
        if ids and not self.prompt_ids:
            self.prompt_ids = ids
        elif ids and ids == self.prompt_ids + self.token_ids[: self._before]:
            self._confirmed = True

    def _alike(self, event: dict[str, Any]) -> Body:
        if (usage := event.get("usage")) and self.dialect.continues_as_prompt:
            usage["prompt_tokens"] = usage.get("prompt_tokens", 0) - self._before
            usage["completion_tokens"] = usage.get("completion_tokens", 0) + self._before
        return {**event, **(self._first or {})}


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _shaped(answer: Mapping[str, Any]) -> bool:
    """Whether what is looked at here of an answer, or a piece of one, has the types that it should."""
    if not _of_types(answer, _ANSWER):
        return False
    usage = answer.get("usage") or {}
    counts = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
    choices = answer.get("choices") or ()
    return all(isinstance(choice, dict) and _of_types(choice, _CHOICE) for choice in choices) and all(
        type(count) is int for count in counts
    )


def _of_types(values: Mapping[str, Any], types: Mapping[str, type]) -> bool:
    return all(isinstance(value, types.get(name, object)) for name, value in values.items() if value is not None)


def _text(choice: Mapping[str, Any], said: Mapping[str, Any] | None) -> dict[str, str]:
    """The texts of one choice: of a chat those in its delta or message, by their field."""
    if said is None:
        return {"text": choice["text"]} if choice.get("text") else {}
    return {name: value for name, value in said.items() if name != "role" and isinstance(value, str) and value}


def _seeded(job: Job) -> bool:
    return isinstance(job.body.get("seed"), int) and job.body.get("temperature") != 0


def _may_stop_within(job: Job, text: str) -> bool:
    """Whether `text` ends with the beginning of a stop string."""
    asked = job.body.get("stop")
    stops = [stop for stop in (asked if isinstance(asked, list) else [asked]) if isinstance(stop, str)]
    return any(text.endswith(stop[:length]) for stop in stops for length in range(1, len(stop)))


class TapedSink:
    """One attempt's view of the client: everything passes the tape, and only the first attempt begins the answer."""

    def __init__(self, sink: Sink, tape: Tape) -> None:
        self._sink = sink
        self._tape = tape
        self._opening: tuple[str, Mapping[str, str]] = ("", {})
        self.started = False
        self.sent = 0  # the sink behind it counts

    def begin(self, content_type: str, headers: Mapping[str, str], length: int | None, data: bytes) -> None:
        """Raises GaveUp, or Broken, of an unstreamed answer that is not to be sent."""
        self._opening = (content_type, headers)
        shown = self._tape.feed(data) if length is None else self._tape.whole(data)
        self.started = True
        self._show(shown, None if length is None else len(shown))

    def write(self, data: bytes) -> None:
        self._show(self._tape.feed(data), None)

    def _show(self, shown: bytes, length: int | None) -> None:
        if not shown:
            return
        if self._sink.started:
            self._sink.write(shown)
        else:
            self._sink.begin(*self._opening, length, shown)

    def end(self) -> None:
        """Raises GaveUp, or Broken, where the answer is not at its end."""
        self._tape.check()
        self._sink.end()

    def chunk_writer(self) -> None:
        """None: whoever wants to resume must see every event."""

    def throttle(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        self._sink.throttle(pause, resume)
