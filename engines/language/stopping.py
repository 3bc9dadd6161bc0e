"""When a choice ends: by its tokens, which the model thread asks for, or by its text, which the handler watches.

`finish_reason` sees ids only; `StopStrings` sees text only, and holds back what may turn out to begin a stop string.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Listing

from engines.language.sequence import Sequence


def finish_reason(seq: Sequence, eos_token_ids: Collection[int]) -> str | None:
    """Why the last token ended the sequence: "stop", "length", or None if it did not."""
    params, last = seq.params, seq.token_ids[-1]
    if seq.num_output_tokens >= params.min_tokens and (
        last in params.stop_token_ids or (last in eos_token_ids and not params.ignore_eos)
    ):
        return "stop"
    return "length" if seq.num_output_tokens >= params.max_tokens else None


class StopStrings:
    """Passes text on until one of `stops` appears in it; the stop string itself and what follows are swallowed."""

    def __init__(self, stops: Listing[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """More text; returns what is safe to show. After a stop string `stopped` is set and everything is swallowed."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text has ended without a stop string: what was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a beginning, not the whole, of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
