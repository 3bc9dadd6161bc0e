"""The Grafana board as a picture, where there is no Grafana: its panels, queries and layout, with a Prometheus' data.

    python -m bench.board --prometheus http://localhost:9090 --minutes 5 --plot board.png

What a panel shows is what Prometheus answers to the panel's own queries. Colours and letters are not Grafana's.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

SHIPPED = Path(__file__).parents[1] / "deploy" / "grafana" / "triptych.json"
ALL = {"$job": ".*", "$proxy": ".*"}
POINTS = 300  # of a line
COLOURS = 128  # of the picture: a third of the bytes
_TIMEOUT_S = 30.0
_WIDTH, _HEIGHT = 0.72, 0.42  # inches of a cell of Grafana's grid
_SHOWN = 6  # legends of a panel
_BELOW = {
    "timeseries": 1.75,
    "heatmap": 0.8,
    "state-timeline": 0.8,
    "stat": 0.4,
}  # cells of the grid, for axis and legend
_COLOURS = ("#3b6fb6", "#e07b39", "#3a9a6a", "#c44e68", "#8a6bbf", "#b59a2c", "#4aa8b8", "#8c8c8c")
_WORDS = {"green": "#73bf69", "orange": "#ff9830", "red": "#f2495c"}  # Grafana's own, of mapped values and limits
_INK, _FAINT = "#24292e", "#8a9199"

Axes = Any
"""A matplotlib Axes, which has no types of its own."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a panel: Unix seconds and values."""

    name: str
    times: Sequence[float]
    values: Sequence[float]


Span = tuple[float, float]
"""From when, until when: Unix seconds."""
Ask = Callable[[str], list[dict[str, Any]]]
"""What a query has given over the time of the picture, as Prometheus' API tells it."""


# ---- asking


def asking(url: str, span: Span, window: str) -> Ask:
    """Of the Prometheus at `url`; rates are over `window`. Raises OSError."""
    start, end = span
    step = max(1.0, (end - start) / POINTS)

    def ask(query: str) -> list[dict[str, Any]]:
        for name, value in (ALL | {"$__rate_interval": window}).items():
            query = query.replace(name, value)
        asked = urllib.parse.urlencode({"query": query, "start": start, "end": end, "step": step})
        with urllib.request.urlopen(f"{url}/api/v1/query_range?{asked}", timeout=_TIMEOUT_S) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return found

    return ask


def series(panel: dict[str, Any], ask: Ask) -> list[Series]:
    """What a panel's queries give, named by its legends."""
    return list(_series(panel, ask))


def _series(panel: dict[str, Any], ask: Ask) -> Iterator[Series]:
    for target in panel["targets"]:
        for found in ask(target["expr"]):
            times, values = zip(*found["values"], strict=True)
            yield Series(_named(target["legendFormat"], found["metric"]), times, [float(value) for value in values])


def _named(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), legend)


# ---- drawing


def top(board: dict[str, Any], rows: int) -> dict[str, Any]:
    """The board's first so many rows."""
    titles = [at for at, panel in enumerate(board["panels"]) if panel["type"] == "row"]
    end = titles[rows] if rows < len(titles) else None
    return board | {"panels": board["panels"][:end]}


def draw(board: dict[str, Any], ask: Ask, span: Span, file: Path) -> None:
    """All of `board` into `file`."""
    from matplotlib import pyplot, rcParams  # here: nobody but this needs it

    rcParams.update({"font.size": 7, "axes.edgecolor": "#d5d9de", "axes.linewidth": 0.6, "text.color": _INK})
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    figure = pyplot.figure(figsize=(24 * _WIDTH, rows * _HEIGHT), facecolor="#f4f5f5")
    for panel in board["panels"]:
        _place(figure, rows, panel, ask, span)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
    with Image.open(file) as picture:
        picture.convert("RGB").quantize(COLOURS).save(file, optimize=True)


def _place(figure: Any, rows: int, panel: dict[str, Any], ask: Ask, span: Span) -> None:
    at = panel["gridPos"]
    left, top = at["x"] / 24, 1 - at["y"] / rows
    if panel["type"] == "row":
        figure.text(left + 0.006, top - 0.65 / rows, panel["title"], fontsize=10, weight="bold", va="center")
        return
    below = _BELOW[panel["type"]]
    inner = (left + 0.032, top - (at["h"] - below) / rows, at["w"] / 24 - 0.042, (at["h"] - below - 1) / rows)
    card = (left + 0.003, top - (at["h"] - 0.12) / rows, at["w"] / 24 - 0.006, (at["h"] - 0.24) / rows)
    figure.add_axes(card, facecolor="white").set(xticks=[], yticks=[])
    figure.text(left + 0.008, top - 0.6 / rows, panel["title"], fontsize=8, weight="bold", va="center")
    found = series(panel, ask)
    axes = figure.add_axes(inner, facecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, labelcolor=_FAINT, labelsize=6)
    if any(value == value for one in found for value in one.values):  # not all of them NaN
        DRAWN[panel["type"]](axes, panel, found)
        axes.set_xlim(span)
    else:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color=_FAINT)


def _timeseries(axes: Axes, panel: dict[str, Any], found: list[Series]) -> None:
    shown = sorted(found, key=lambda one: -sum(v for v in one.values if v == v))
    if panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal":
        _stacked(axes, shown)
    else:
        for number, one in enumerate(shown):
            axes.plot(one.times, one.values, color=_COLOURS[number % len(_COLOURS)], linewidth=1, label=one.name)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#e9ebee", linewidth=0.5)
    _clock(axes)
    _unit(axes, panel)
    lines, names = axes.get_legend_handles_labels()
    if any(names):
        place = {"loc": "upper left", "bbox_to_anchor": (0, -0.13), "ncols": 3, "borderaxespad": 0}
        look = {"frameon": False, "fontsize": 6, "handlelength": 1, "columnspacing": 1}
        axes.legend(lines[:_SHOWN], names[:_SHOWN], **place, **look)


def _stacked(axes: Axes, shown: list[Series]) -> None:
    times = sorted({at for one in shown for at in one.times})
    levels = []
    for one in shown:
        known = dict(zip(one.times, one.values, strict=True))
        levels.append([known.get(at, 0.0) for at in times])
    colours = [_COLOURS[number % len(_COLOURS)] for number in range(len(shown))]
    axes.stackplot(times, levels, colors=colours, labels=[one.name for one in shown], alpha=0.75, linewidth=0)


def _stat(axes: Axes, panel: dict[str, Any], found: list[Series]) -> None:
    (one,) = found
    last = next(value for value in reversed(one.values) if value == value)
    axes.fill_between(one.times, 0, one.values, color="#dfe7f3", linewidth=0)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    told = written(last, panel["fieldConfig"]["defaults"]["unit"])
    axes.text(0.5, 0.55, told, transform=axes.transAxes, ha="center", va="center", fontsize=16, color=_ink(panel, last))


def _ink(panel: dict[str, Any], value: float) -> str:
    """The colour of the highest limit that `value` has reached."""
    steps = panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])
    reached = [step["color"] for step in steps if step["value"] is None or value >= step["value"]]
    return _WORDS[reached[-1]] if reached else _INK


def _heatmap(axes: Axes, panel: dict[str, Any], found: list[Series]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    bounds = sorted(found, key=lambda one: float(one.name))
    times = sorted({at for one in bounds for at in one.times})
    known = [dict(zip(one.times, one.values, strict=True)) for one in bounds]
    below = [[0.0] * len(times), *([of.get(at, 0.0) for at in times] for of in known)]
    cells = [[max(0.0, b - a) for a, b in zip(*pair, strict=True)] for pair in pairwise(below)]
    colours = LinearSegmentedColormap.from_list("heat", ["#ffffff", "#fdd0a2", "#f16913", "#7f2704"])
    axes.pcolormesh(times, range(len(bounds)), cells, cmap=colours, shading="nearest")
    axes.set_yticks(range(len(bounds)), [written(float(one.name), "s") for one in bounds], fontsize=5)
    _clock(axes)


def _states(axes: Axes, panel: dict[str, Any], found: list[Series]) -> None:
    (mapping,) = panel["fieldConfig"]["defaults"]["mappings"]
    step = min((b - a for one in found for a, b in pairwise(one.times)), default=1.0)
    for number, one in enumerate(found):
        colours = [_WORDS[mapping["options"][str(int(value))]["color"]] for value in one.values]
        axes.barh([number] * len(one.times), step, left=one.times, height=0.5, color=colours, linewidth=0)
        axes.annotate(one.name, (one.times[0], number + 0.3), fontsize=6, color=_INK)
    axes.set(yticks=[], ylim=(-0.4, len(found) - 0.2))
    axes.spines["left"].set_visible(False)
    _clock(axes)


DRAWN: dict[str, Callable[[Axes, dict[str, Any], list[Series]], None]] = {
    "timeseries": _timeseries,
    "stat": _stat,
    "heatmap": _heatmap,
    "state-timeline": _states,
}


def _clock(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: time.strftime("%H:%M:%S", time.localtime(at))))


def _unit(axes: Axes, panel: dict[str, Any]) -> None:
    from matplotlib.ticker import FuncFormatter

    unit = panel["fieldConfig"]["defaults"]["unit"]
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value, unit)))
    axes.locator_params(axis="y", nbins=5)


def written(value: float, unit: str) -> str:
    """With a unit of Grafana's."""
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if value == float("inf"):
        return "∞"
    if unit == "s" and 0 < abs(value) < 1:
        return f"{value * 1000:.3g} ms" if abs(value) >= 1e-3 else f"{value * 1e6:.3g} µs"
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}{_AFTER.get(unit, '')}"
    return f"{value:.3g} {_AFTER.get(unit, '')}".strip()


_AFTER = {"s": "s", "Bps": "B/s", "reqps": "/s", "ops": "/s"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.board", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prometheus", default="http://localhost:9090", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=30.0, help="how far back (default: %(default)g)")
    parser.add_argument("--window", default="1m", help="of rates; four scrapes or more (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=99, metavar="N", help="only the first N rows of panels")
    parser.add_argument("--plot", type=Path, required=True, metavar="FILE", help="the picture")
    arguments = parser.parse_args(argv)
    now = time.time()
    span = (now - arguments.minutes * 60, now)
    try:
        ask = asking(arguments.prometheus, span, arguments.window)
        draw(top(json.loads(SHIPPED.read_text()), arguments.rows), ask, span, arguments.plot)
    except OSError as error:
        print(f"board: {arguments.prometheus}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
