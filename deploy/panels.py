"""Panels in rows, and Grafana's JSON model of a board with them. Knows nothing of what they show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_WIDTH = 24
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True)
class Panel:
    """`queries` are (legend, PromQL) in Grafana's dialect of it: with $job, $proxy and $__rate_interval."""

    title: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    what: str = ""  # for whoever points at the title
    kind: str = "timeseries"  # or stat, heatmap, state-timeline
    width: int = 8  # of 24
    height: int = 7
    stacked: bool = False
    limits: tuple[float, float] | None = None  # from where it is worth a look, from where it is bad
    words: Sequence[tuple[str, str]] = ()  # for the values 0, 1, …: what to say instead, and its colour


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: Sequence[Panel]


def panels(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Grafana's JSON of each, laid out from left to right and top to bottom."""
    number, y = 0, 0
    for row in rows:
        number += 1
        yield {"id": number, "type": "row", "title": row.title, "collapsed": False, "panels": []} | _place(
            0, y, _WIDTH, 1
        )
        x, y, height = 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > _WIDTH:
                x, y, height = 0, y + height, 0
            number += 1
            yield _panel(number, panel) | _place(x, y, panel.width, panel.height)
            x, height = x + panel.width, max(height, panel.height)
        y += height


def _place(x: int, y: int, width: int, height: int) -> dict[str, Any]:
    return {"gridPos": {"x": x, "y": y, "w": width, "h": height}}


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.what,
        "datasource": SOURCE,
        "targets": [_target(panel, chr(ord("A") + n), *query) for n, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _OPTIONS[panel.kind],
    }


def _target(panel: Panel, ref: str, legend: str, query: str) -> dict[str, Any]:
    return {
        "refId": ref,
        "datasource": SOURCE,
        "expr": query,
        "legendFormat": legend,
        "range": True,
        "format": "heatmap" if panel.kind == "heatmap" else "time_series",
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    found: dict[str, Any] = {"unit": panel.unit}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        found["custom"] = {"fillOpacity": 25 if panel.stacked else 5, "showPoints": "never", "stacking": stacking}
        found["min"] = 0
    if panel.limits is not None:
        found["thresholds"] = {"mode": "absolute", "steps": _steps(*panel.limits)}
        found["color"] = {"mode": "thresholds"}
    if panel.words:
        told = {str(value): {"text": text, "color": colour} for value, (text, colour) in enumerate(panel.words)}
        found["mappings"] = [{"type": "value", "options": told}]
    return found


def _steps(fair: float, bad: float) -> list[dict[str, Any]]:
    return [
        {"color": "green", "value": None},
        {"color": "orange", "value": fair},
        {"color": "red", "value": bad},
    ]


_LAST = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_LEGEND = {"displayMode": "list", "placement": "bottom", "showLegend": True}
_OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {"legend": _LEGEND, "tooltip": {"mode": "multi", "sort": "desc"}},
    "stat": {"reduceOptions": _LAST, "colorMode": "value", "graphMode": "area", "textMode": "auto"},
    "heatmap": {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
        "yAxis": {"unit": "s", "axisPlacement": "left"},
        "tooltip": {"mode": "single", "yHistogram": True},
        "legend": {"show": False},
    },
    "state-timeline": {"legend": {**_LEGEND, "showLegend": False}, "mergeValues": True, "showValue": "auto"},
}
