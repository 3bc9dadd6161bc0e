"""The scenarios' pictures, out of a report's rows alone. Nothing is simulated here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report import Report, machine

Row = Mapping[str, Any]
Panel = Any
"""A matplotlib Axes, which has no types of its own."""

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
"""Paul Tol's bright scheme: told apart by colour-blind readers, too."""
MARKERS = "osD^vPX"


def policies(report: Report, file: Path) -> None:
    """Mean and p99 against the offered load; with reuse above, without below."""
    kinds = _distinct(report.rows, "images")
    figure, panels = _panels(len(kinds), 2, (10, 4 * len(kinds)))
    for kind, (mean, p99) in zip(kinds, panels, strict=True):
        rows = [row for row in report.rows if row["images"] == kind]
        _lines(mean, rows, "policy", "offered", "mean_ms")
        _lines(p99, rows, "policy", "offered", "p99_ms")
        for panel, what in ((mean, "mean"), (p99, "p99")):
            panel.set(xlabel="offered load", ylabel=f"encode time, {what} (ms)", yscale="log", title=f"images: {kind}")
            _plain(panel)
            panel.grid(True, which="both", alpha=0.25)
    panels[0][0].legend(fontsize="small")
    _save(figure, report, file)


def decider(report: Report, file: Path) -> None:
    """First-token time by workload: always apart, never, and as decided for each request."""
    figure, panels = _panels(1, 1, (13, 4.5))
    names = [row["workload"].replace(", ", "\nload ") for row in report.rows]
    columns = {"always apart": "always_ms", "always inline": "never_ms", "decided per request": "decided_ms"}
    _groups(panels[0][0], names, {label: [row[key] for row in report.rows] for label, key in columns.items()})
    panels[0][0].set(ylabel="time to first token, mean (ms)", yscale="log")
    _plain(panels[0][0])
    _save(figure, report, file)


def scale(report: Report, file: Path) -> None:
    """Microseconds of one decision by the number of instances."""
    rows = [row for row in report.rows if "decision" in row]
    figure, panels = _panels(1, 1, (7, 4))
    _lines(panels[0][0], rows, "decision", "instances", "microseconds")
    panels[0][0].set(xlabel="instances", ylabel="median of one decision (µs)", xscale="log", ylim=(0, None))
    panels[0][0].grid(True, which="both", alpha=0.25)
    panels[0][0].legend(fontsize="small")
    _save(figure, report, file)


def planner(report: Report, file: Path) -> None:
    """Requests per second carried by every workload's advised split and its best one."""
    figure, panels = _panels(1, 1, (9, 4.5))
    names = [f"{row['workload']}\n{row['advised']} / {row['best']}" for row in report.rows]
    columns = {"advised": "advised_rps", "best of all splits": "best_rps"}
    _groups(panels[0][0], names, {label: [row[key] for row in report.rows] for label, key in columns.items()})
    panels[0][0].set(ylabel="requests per second within the targets", xlabel="workload, E:P:D advised / best")
    _save(figure, report, file)


def seeds(report: Report, file: Path) -> None:
    """Published beside simulated: one panel for each quantity that both have, in the rows' own units."""
    rows = report.rows
    names = [f"{row['model'].removeprefix('Qwen')}\n{row['deployment']}" for row in rows]
    quantities = [key.removeprefix("published_") for key in rows[0] if key.startswith("published_")]
    figure, panels = _panels(1, len(quantities), (max(5, 2.6 * len(rows)) * min(len(quantities), 2), 4.2))
    for panel, quantity in zip(panels[0], quantities, strict=True):
        pair = {label: [row[f"{label}_{quantity}"] for row in rows] for label in ("published", "simulated")}
        _groups(panel, names, pair)
        panel.set(title=quantity.replace("_", " "))
    _save(figure, report, file)


PICTURES: Mapping[str, Callable[[Report, Path], None]] = {
    "seed000": seeds,
    "seed001": seeds,
    "policies": policies,
    "decider": decider,
    "scale": scale,
    "planner": planner,
}
"""By scenario."""


def _panels(down: int, across: int, size: tuple[float, float]) -> tuple[Any, Sequence[Sequence[Panel]]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(down, across, figsize=size, squeeze=False)
    return figure, panels


def _save(figure: Any, report: Report, file: Path) -> None:
    from matplotlib import pyplot

    figure.suptitle(f"{report.bench} on {machine()}", fontsize="medium")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _plain(panel: Panel) -> None:
    """A logarithmic axis with numbers at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def _lines(panel: Panel, rows: Sequence[Row], name: str, across: str, up: str) -> None:
    """A line for each value of `name`, from each of its rows."""
    for number, label in enumerate(_distinct(rows, name)):
        own = [row for row in rows if row[name] == label]
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        panel.plot([row[across] for row in own], [row[up] for row in own], label=label, markersize=4, **style)


def _groups(panel: Panel, names: Sequence[str], columns: Mapping[str, Sequence[float]]) -> None:
    """Groups of bars side by side, a colour for each of `columns`, their values above them."""
    width = 0.8 / len(columns)
    for number, (label, values) in enumerate(columns.items()):
        at = [group + (number + 0.5) * width - 0.4 for group in range(len(names))]
        bars = panel.bar(at, values, width, label=label, color=COLOURS[number % len(COLOURS)])
        panel.bar_label(bars, fmt=_number, fontsize="x-small")
    panel.set_xticks(range(len(names)), names, fontsize="x-small")
    panel.legend(fontsize="small")


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _distinct(rows: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))
