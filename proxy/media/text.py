"""How many tokens a text is, guessed from its bytes and corrected by what engines count. Pure: no tokenizer, no clock.

One number per model: tokens told over tokens guessed. Long prompts weigh more than short ones, in which the chat
template is much of what is counted; recent ones weigh more than old ones; and no single answer moves it far.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES_PER_TOKEN = 4  # of UTF-8: a CJK character is three of them and about one token, which fits
_KEPT = 0.98  # of the past at each answer: half of it is gone after 34
_PRIOR = 256.0  # guessed tokens that the first answers have to outweigh
_FARTHEST = 2.0  # times what was expected, that one answer is believed
_MODELS = 256  # remembered; clients choose their names, though only what an engine serves is learnt


@dataclass(slots=True)
class _Ratio:
    told: float = _PRIOR
    guessed: float = _PRIOR

    @property
    def value(self) -> float:
        return self.told / self.guessed


class Text:
    """`tokens` may be called by any thread."""

    def __init__(self) -> None:
        self._ratios: dict[str, _Ratio] = {}

    def tokens(self, model: str, nbytes: int) -> int:
        """Of `nbytes` of text in UTF-8; at least 1."""
        ratio = self._ratios.get(model)
        guess = nbytes / BYTES_PER_TOKEN
        return max(1, int(guess if ratio is None else guess * ratio.value))

    def learn(self, model: str, nbytes: int, told: int) -> None:
        """A prompt with `nbytes` of text was `told` tokens, without those of its media. Nothing is learnt from a prompt
        of token ids, whose `nbytes` is 0."""
        if nbytes <= 0 or told <= 0:
            return
        ratio = self._ratios.pop(model, None) or _Ratio()
        guess = nbytes / BYTES_PER_TOKEN
        expected = guess * ratio.value
        believed = min(max(told, expected / _FARTHEST), expected * _FARTHEST)
        ratio.told = ratio.told * _KEPT + believed
        ratio.guessed = ratio.guessed * _KEPT + guess
        self._ratios[model] = ratio  # the last: the first is the one that was learnt longest ago
        if len(self._ratios) > _MODELS:
            del self._ratios[next(iter(self._ratios))]

    def shown(self) -> dict[str, float]:
        """The bytes of a token, by model, for people."""
        return {model: round(BYTES_PER_TOKEN / ratio.value, 2) for model, ratio in self._ratios.items()}
