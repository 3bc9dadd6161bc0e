"""From tokens to what a client sees of them: text, log-probabilities, why a choice ended, and how much was used.

One `Choice` per alternative of a request. It knows no response format and decides nothing but where a stop string ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engines.language.sequence import SamplingParams
from engines.language.stopping import StopStrings
from engines.language.stream import Token
from engines.language.tokenizer import ChatTokenizer, Detokenizer


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token as bytes, and how likely it was."""

    token: bytes
    logprob: float

    @property
    def text(self) -> str:
        return self.token.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Scored:
    """One generated token with its alternatives, best first."""

    chosen: Logprob
    top: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """What some tokens add to a choice. `offset`: characters of text before it."""

    index: int
    text: str
    offset: int
    scored: tuple[Scored, ...] = ()
    finish_reason: str | None = None
    token_ids: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.scored or self.finish_reason)


class Choice:
    """The text of one choice as it grows."""

    def __init__(self, index: int, tokenizer: ChatTokenizer, params: SamplingParams) -> None:
        self.index = index
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self.pieces: list[Piece] = []
        self._tokenizer = tokenizer
        self._params = params
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(params.stop)
        self._length = 0

    @property
    def stopped(self) -> bool:
        """A stop string ended it: the engine does not know yet."""
        return self._stops.stopped

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    def push(self, tokens: Iterable[Token]) -> Piece:
        """Take tokens; those behind the end are ignored and not counted."""
        text, scored, ids = "", [], []
        for token in tokens:
            if self.finish_reason is not None:
                break
            self.num_tokens += 1
            ids.append(token.token_id)
            text += self._read(token)
            if token.logprob is not None:
                scored.append(self._scored(token))
        piece = Piece(self.index, text, self._length, tuple(scored), self.finish_reason, tuple(ids))
        self._length += len(text)
        self.pieces.append(piece)
        return piece

    def replay(self, token_ids: Iterable[int]) -> None:
        """Take tokens that have been shown already: they count, and what follows fits to them."""
        self.push(Token(self.index, token_id) for token_id in token_ids)
        self.pieces.clear()

    def _read(self, token: Token) -> str:
        """The text that a token lets out. One that ended the choice by its id is not shown."""
        ends_by_id = token.finish_reason == "stop"
        text = "" if ends_by_id else self._detokenizer.push([token.token_id])
        if token.finish_reason is not None:
            text += self._detokenizer.finish()
        if self.num_tokens > self._params.min_tokens:
            text = self._stops.push(text)
        if self._stops.stopped:
            self.finish_reason = "stop"
        elif token.finish_reason is not None:
            self.finish_reason = token.finish_reason
            text += self._stops.flush()
        return text

    def _scored(self, token: Token) -> Scored:
        top = tuple(self._logprob(token_id, logprob) for token_id, logprob in token.top_logprobs)
        return Scored(self._logprob(token.token_id, token.logprob or 0.0), top)

    def _logprob(self, token_id: int, logprob: float) -> Logprob:
        return Logprob(self._tokenizer.token_bytes(token_id), logprob)
