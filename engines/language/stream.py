"""What the model thread tells a request's handler, in the order it happened. It lives on the loop alone.

A stream ends in one of three ways: every choice finished, an error, or `close` by the handler that lost interest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token of one choice; `finish_reason` ("stop", "length") when it is the choice's last."""

    index: int
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None


class Stream:
    """An async iterator over lists of tokens: all that came since the last look. Raises the request's error."""

    def __init__(self, abort: Callable[[], None], stop: Callable[[int], None]) -> None:
        self._abort = abort
        self._stop = stop
        self.num_cached = 0  # tokens of the prompt whose KV was here before; known with the first token
        self._tokens: list[Token] = []
        self._blocks: tuple[int, ...] | None = None
        self._error: Exception | None = None
        self._ended = False
        self._news = asyncio.Event()

    async def admitted(self) -> tuple[int, ...]:
        """Wait for the blocks of a sequence that is handed over, and return them. Raises the request's error."""
        while self._blocks is None:
            if self._error is not None:
                raise self._error
            await self._wait()
        return self._blocks

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[Token]:
        while not self._tokens:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            await self._wait()
        tokens, self._tokens = self._tokens, []
        return tokens

    def stop(self, index: int) -> None:
        """No more tokens of this choice are wanted: its text has reached a stop string."""
        self._stop(index)

    def close(self) -> None:
        """Nothing more is wanted. Its blocks are free after the step that runs now. Idempotent."""
        if not self._ended:
            self._ended = True
            self._abort()

    # -- called by the engine, on the loop ----------------------------------------------------------------------------

    def on_blocks(self, blocks: tuple[int, ...]) -> None:
        self._blocks = blocks
        self._news.set()

    def on_prefilled(self, num_cached: int) -> None:
        self.num_cached = num_cached

    def on_token(self, token: Token) -> None:
        self._tokens.append(token)
        self._news.set()

    def on_end(self, error: Exception | None = None) -> None:
        self._ended = True
        self._error = error
        self._news.set()

    async def _wait(self) -> None:
        self._news.clear()
        await self._news.wait()
