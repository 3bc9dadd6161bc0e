"""The shapes of OpenAI's answers, streamed and whole, for chat and for completions. Pure: pieces in, mappings out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.language.choices import Choice, Logprob, Piece, Scored


@dataclass(frozen=True, slots=True)
class Answer:
    """What all parts of one answer have in common. `created` is seconds since 1970."""

    id: str
    model: str
    created: int
    chat: bool
    logprobs: bool  # asked for
    include_usage: bool = False  # in a stream
    token_ids: bool = False  # asked for, as in vLLM

    def opening(self, index: int) -> dict[str, Any]:
        """A chat stream's first chunk of a choice, which names the role."""
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
        return self._chunk([{**choice, "finish_reason": None}])

    def chunk(self, piece: Piece) -> dict[str, Any]:
        shown = {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
        choice = {"index": piece.index, **shown, "logprobs": self._logprobs([piece]), **self._ids([piece])}
        return self._chunk([{**choice, "finish_reason": piece.finish_reason}])

    def closing(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The last chunk of a stream with `include_usage`."""
        return {**self._chunk([]), "usage": usage}

    def whole(
        self, choices: Sequence[Choice], usage: Mapping[str, Any], kv_transfer_params: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        return {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage,
            "kv_transfer_params": kv_transfer_params,
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        if self.chat:
            shown: dict[str, Any] = {"message": {"role": "assistant", "content": choice.text}}
        else:
            shown = {"text": choice.text}
        logprobs = self._logprobs(choice.pieces)
        ended = {"logprobs": logprobs, **self._ids(choice.pieces), "finish_reason": choice.finish_reason}
        return {"index": choice.index, **shown, **ended}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": choices}
        return {**chunk, "usage": None} if self.include_usage else chunk

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _ids(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        return {"token_ids": [one for piece in pieces for one in piece.token_ids]} if self.token_ids else {}

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return _chat_logprobs(pieces) if self.chat else _completion_logprobs(pieces)


def usage_of(prompt_tokens: int, choices: Iterable[Choice], cached_tokens: int = 0) -> dict[str, Any]:
    """`cached_tokens`: those of the prompt whose KV was here before."""
    generated = sum(choice.num_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def _chat_logprobs(pieces: Iterable[Piece]) -> dict[str, Any]:
    return {"content": [_chat_scored(scored) for piece in pieces for scored in piece.scored], "refusal": None}


def _chat_scored(scored: Scored) -> dict[str, Any]:
    return {**_chat_token(scored.chosen), "top_logprobs": [_chat_token(entry) for entry in scored.top]}


def _chat_token(entry: Logprob) -> dict[str, Any]:
    return {"token": entry.text, "logprob": entry.logprob, "bytes": list(entry.token)}


def _completion_logprobs(pieces: Iterable[Piece]) -> dict[str, Any]:
    """Parallel lists. A token's offset counts the text of the tokens before it, shown or not."""
    tokens: list[str] = []
    logprobs: list[float] = []
    tops: list[dict[str, float]] = []
    offsets: list[int] = []
    for piece in pieces:
        offset = piece.offset
        for scored in piece.scored:
            tokens.append(scored.chosen.text)
            logprobs.append(scored.chosen.logprob)
            # The chosen one is always there, also when it is none of the best.
            tops.append({entry.text: entry.logprob for entry in (*scored.top, scored.chosen)})
            offsets.append(offset)
            offset += len(scored.chosen.text)
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}
