"""What a run comes to: a row for each kind of request, failures by what they said, a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path
from statistics import fmean, median
from typing import Any

from bench.load.asking import Outcome
from bench.report import Report

QUANTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Targets:
    """Seconds; a served request is good if it keeps both."""

    first: float = inf
    pace: float = inf

    @property
    def any(self) -> bool:
        return min(self.first, self.pace) < inf

    def kept(self, outcome: Outcome) -> bool:
        in_time = (outcome.ended if outcome.first is None else outcome.first) <= self.first
        return not outcome.error and in_time and (outcome.pace or 0.0) <= self.pace


def rows(outcomes: Sequence[Outcome], seconds: float, targets: Targets) -> list[dict[str, Any]]:
    """One for all, and where there are several kinds one for each. Times in milliseconds."""
    kinds = sorted({outcome.kind for outcome in outcomes})
    chosen = [("all", outcomes)] if len(kinds) != 1 else []
    chosen += [(kind, [outcome for outcome in outcomes if outcome.kind == kind]) for kind in kinds]
    return [_row(kind, found, seconds, targets) for kind, found in chosen]


def _row(kind: str, outcomes: Sequence[Outcome], seconds: float, targets: Targets) -> dict[str, Any]:
    served = [outcome for outcome in outcomes if not outcome.error]
    row: dict[str, Any] = {
        "kind": kind,
        "requests": len(outcomes),
        "failed": len(outcomes) - len(served),
        "req/s": round(len(served) / seconds, 3),
        "tok/s": round(sum(outcome.output_tokens for outcome in served) / seconds, 1),
    }
    if targets.any:
        row["good/s"] = round(sum(map(targets.kept, outcomes)) / seconds, 3)
    row |= _spread("ttft", [outcome.first for outcome in served if outcome.first is not None])
    row |= _spread("tpot", [outcome.pace for outcome in served if outcome.pace is not None])
    row |= _spread("itl", [pause for outcome in served for pause in outcome.pauses], QUANTILES[-1:])
    return row | _spread("e2e", [outcome.ended for outcome in served])


def _spread(name: str, seconds: Sequence[float], quantiles: Sequence[int] = QUANTILES) -> dict[str, float | None]:
    ordered = sorted(seconds)
    return {f"{name} p{q}": round(quantile(ordered, q) * 1000, 2) if ordered else None for q in quantiles}


def block(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """The figures that serving benchmarks publish, all of requests that were served. Times in milliseconds; TTFT is of
    those that produced tokens, TPOT and ITL of those that produced two."""
    served = [outcome for outcome in outcomes if not outcome.error]
    read, written = (sum(getattr(outcome, name) for outcome in served) for name in ("prompt_tokens", "output_tokens"))
    found: dict[str, Any] = {
        "duration_s": round(seconds, 1),
        "completed": len(served),
        "failed": len(outcomes) - len(served),
        "input_tokens": read,
        "output_tokens": written,
        "req/s": round(len(served) / seconds, 3),
        "in_tok/s": round(read / seconds, 1),
        "out_tok/s": round(written / seconds, 1),
        "concurrency": round(sum(outcome.ended for outcome in served) / seconds, 2),
    }
    for name, times in (
        ("ttft", [outcome.first for outcome in served if outcome.first is not None]),
        ("tpot", [outcome.pace for outcome in served if outcome.pace is not None]),
        ("itl", [pause for outcome in served for pause in outcome.pauses]),
        ("e2e", [outcome.ended for outcome in served]),
    ):
        found |= {f"{name} {which}": round(1000 * of(times), 2) if times else None for which, of in _BLOCK.items()}
    return found


def quantile(ordered: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of them do not exceed."""
    return ordered[max(0, ceil(len(ordered) * percent / 100) - 1)]


def failures(outcomes: Sequence[Outcome]) -> list[tuple[str, int]]:
    """What failed requests said, the most frequent first."""
    return Counter(outcome.error for outcome in outcomes if outcome.error).most_common()


def routes(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many went which path, where the server says so."""
    return dict(Counter(outcome.route.partition(";")[0] for outcome in outcomes if outcome.route).most_common())


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line of progress."""
    served = [outcome for outcome in outcomes if not outcome.error]
    firsts = [outcome.first for outcome in served if outcome.first is not None]
    said = f"{len(outcomes)} done"
    if len(outcomes) > len(served):
        said += f", {len(outcomes) - len(served)} failed"
    return said + (f", first token {fmean(firsts) * 1000:.0f} ms" if firsts else "")


def draw(outcomes: Sequence[Outcome], file: Path) -> None:
    """First tokens and paces as cumulative shares, and first tokens over the run. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    served = [outcome for outcome in outcomes if not outcome.error]
    began = min((outcome.due for outcome in outcomes), default=0.0)
    figure, (first, pace, course) = pyplot.subplots(1, 3, figsize=(14, 4))
    for kind, colour in (("text", "#4477aa"), ("image", "#ee6677")):
        found = [outcome for outcome in served if outcome.kind == kind]
        _cumulative(first, [o.first * 1000 for o in found if o.first is not None], kind, colour)
        _cumulative(pace, [o.pace * 1000 for o in found if o.pace is not None], kind, colour)
        seen = [(o.due - began, o.first * 1000) for o in found if o.first is not None]
        course.scatter(*zip(*seen, strict=True), s=8, color=colour, label=kind) if seen else None
    lost = [outcome.due - began for outcome in outcomes if outcome.error]
    course.scatter(lost, [0.0] * len(lost), marker="x", color="black", label="failed") if lost else None
    for panel, across, up in (
        (first, "first token, ms", "share of requests"),
        (pace, "per output token, ms", "share of requests"),
        (course, "seconds since the start", "first token, ms"),
    ):
        panel.set_xlabel(across)
        panel.set_ylabel(up)
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _cumulative(panel: Any, values: Sequence[float], label: str, colour: str) -> None:
    if values:
        ordered = sorted(values)
        panel.step(ordered, [(n + 1) / len(ordered) for n in range(len(ordered))], color=colour, label=label)


_BLOCK: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean": fmean,
    "median": median,
    "p99": lambda times: quantile(sorted(times), 99),
}


def picture(outcomes: Sequence[Outcome]) -> Any:
    """What a Report calls for `--plot`."""

    def drawn(report: Report, file: Path) -> None:
        draw(outcomes, file)

    return drawn
