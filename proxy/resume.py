"""Going on with a stream elsewhere after its engine died: who may, and what makes two streams one.

A native engine that is asked for `return_token_ids` tells the tokens behind each event, and one that is given
`continue_token_ids` goes on after them as if it had said them itself: same text, same finish, same usage. That is exact
where the next token depends on the tokens alone: greedy, or with a seed. The client sees one stream, without the ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import orjson

from proxy.core import Body, Job
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
)
_SHARED = ("id", "created", "model")


def eligible(job: Job) -> bool:
    """Whether the stream that `job` asks for could be continued exactly."""
    body = job.body
    deterministic = body.get("temperature") == 0 or isinstance(body.get("seed"), int)
    return (
        job.stream
        and deterministic
        and body.get("n") in (None, 1)
        and not any(body.get(name) for name in _INEXACT)
        and not body.get(ASK)
        and CONTINUE not in body
    )


class Tape:
    """What of a stream has gone to the client: its token ids, and how to make later events look as the first ones."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.finished = False  # its last token is there, and maybe its usage
        self._exact = True  # every piece of text came with its tokens
        self._first: dict[str, Any] | None = None
        self._continues = False
        self._has_usage = False
        self._splitter = Splitter()

    @property
    def usable(self) -> bool:
        """Whether another engine can go on where this stream stands."""
        return self._exact and bool(self.token_ids) and not self.finished

    def complete(self, job: Job) -> bool:
        """Whether nothing but the stream's end is missing."""
        options = job.body.get("stream_options") or {}
        return self.finished and (self._has_usage or not options.get("include_usage"))

    def asking(self, job: Job) -> Job:
        """`job` as the engine gets it: told to name its tokens, and from where to go on."""
        fields: dict[str, Any] = {ASK: True}
        if self.token_ids:
            fields[CONTINUE] = list(self.token_ids)
        return replace(job, body={**job.body, **fields}, raw=b"")

    def cut(self) -> None:
        """The stream broke off; what comes next continues it."""
        self._splitter = Splitter()
        self._continues = True

    def feed(self, data: bytes) -> bytes:
        """Whole events, as the client is to see them. Half an event is held, and lost with the stream it is from."""
        return b"".join(self._seen(event) for event in self._splitter.feed(data))

    def _seen(self, event: Event) -> bytes:
        data = event.data
        if not data or data == DONE:
            return event.raw
        try:
            parsed = orjson.loads(data)
        except orjson.JSONDecodeError:
            parsed = None
        if not isinstance(parsed, dict):
            self._exact = False
            return event.raw
        choices = parsed.get("choices") or []
        shown = [choice for choice in choices if self._take(choice)]
        self._has_usage = self._has_usage or bool(parsed.get("usage"))
        if choices and not shown:
            return b""
        parsed["choices"] = shown
        return b"data: " + orjson.dumps(self._alike(parsed)) + b"\n\n"

    def _take(self, choice: dict[str, Any]) -> bool:
        """Note a choice's tokens and take them out of it; False if nothing is left to show."""
        ids = choice.pop("token_ids", None)
        delta = choice.get("delta") or {}
        text = delta.get("content") or choice.get("text")
        finish = choice.get("finish_reason")
        if ids:
            self.token_ids += ids
        elif text:
            self._exact = False
        self.finished = self.finished or bool(finish)
        opens = "role" in delta and not self._continues
        return bool(text or finish or opens)

    def _alike(self, event: dict[str, Any]) -> Body:
        if self._first is None:
            self._first = {name: event[name] for name in _SHARED if name in event}
        return {**event, **self._first}


class TapedSink:
    """One attempt's view of the client: everything passes the tape, and only the first attempt begins the answer."""

    def __init__(self, sink: Sink, tape: Tape) -> None:
        self._sink = sink
        self._tape = tape
        self.started = False
        self.sent = 0  # bytes, before the ids are taken out
        self.sent = 0  # the sink behind it counts

    def begin(self, content_type: str, headers: Mapping[str, str], length: int | None, data: bytes) -> None:
        self.started = True
        shown = self._tape.feed(data)
        if not self._sink.started:
            self._sink.begin(content_type, headers, length, shown)
        elif shown:
            self._sink.write(shown)

    def write(self, data: bytes) -> None:
        if shown := self._tape.feed(data):
            self._sink.write(shown)

    def end(self) -> None:
        self._sink.end()

    def chunk_writer(self) -> None:
        """None: whoever wants to resume must see every event."""

    def throttle(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        self._sink.throttle(pause, resume)
