"""Which of several paths a request takes that could all serve it: by predicted first tokens, without wavering.

It sees predictions only, and remembers nothing but the path that each kind of request takes at present. To change it,
another must promise more than what predictions are wrong by anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proxy.core import Job, Path

MARGIN = 0.03  # of the present path's time
HEAVY = 4096  # tokens of encode work: about four images of 900 x 900
_WORDS = {
    Path.E_P_D: "apart",
    Path.E_PD: "encoded apart",
    Path.EP_D: "inline in prefill",
    Path.EPD: "inline",
    Path.P_D: "apart",
    Path.PD: "combined",
}


@dataclass(frozen=True, slots=True)
class Forecast:
    path: Path
    seconds: float  # to the first token

    def __str__(self) -> str:
        return f"{self.seconds * 1000:.0f} ms {_WORDS[self.path]}"


def kind(job: Job) -> str:
    """Requests of one kind share a preference."""
    if not job.items:
        return "text"
    return "heavy media" if sum(item.work for item in job.items) >= HEAVY else "light media"


class Decider:
    """One for the whole proxy."""

    def __init__(self, margin: float = MARGIN) -> None:
        self._margin = margin
        self._present: dict[str, Path] = {}  # by kind

    def __repr__(self) -> str:
        return f"<Decider { ({kind: path.label for kind, path in self._present.items()}) }>"

    def decide(self, kind: str, forecasts: Sequence[Forecast]) -> tuple[Path, str]:
        """The path, and both its time and that of the best other one in words.

        `forecasts`: at least two, those first that are preferred where nothing else is known.
        """
        present = next((f for f in forecasts if f.path is self._present.get(kind)), forecasts[0])
        best = min(forecasts, key=lambda forecast: forecast.seconds)
        if best.seconds < present.seconds * (1 - self._margin):
            present = best
        self._present[kind] = present.path
        other = min((f for f in forecasts if f is not present), key=lambda forecast: forecast.seconds)
        return present.path, f"{present}, {other}"
