"""What every benchmark prints: a table for people, one JSON object for programs, a picture on request, and its bars.

A bar is a promise with a limit; the exit status is 1 when one does not hold. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Op = Literal["<=", ">="]
HOLDS: dict[Op, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True, slots=True)
class Bar:
    """A measured value and the limit it must keep; `op` says on which side."""

    name: str
    value: float
    op: Op
    limit: float
    holds: bool


@dataclass(slots=True)
class Report:
    """Collects the rows and bars of one run of the benchmark `bench`."""

    bench: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    picture: Callable[[Report, Path], None] | None = None  # what `--plot` draws; None: `plot`

    def progress(self, text: str) -> None:
        """One line on stderr, so that a long run shows where it is."""
        print(f"{self.bench}: {text}", file=sys.stderr, flush=True)

    def row(self, **values: Any) -> None:
        self.rows.append(values)

    def bar(self, name: str, value: float, limit: float, op: Op = "<=") -> None:
        self.bars.append(Bar(name, round(value, 4), op, limit, HOLDS[op](value, limit)))

    def emit(self, arguments: argparse.Namespace) -> int:
        """Print as the flags of `add_arguments` ask; the exit status."""
        if arguments.plot:
            (self.picture or plot)(self, arguments.plot)
        text = json.dumps(self.as_dict()) if arguments.json else self.table()
        print(text, flush=True)
        return 0 if all(bar.holds for bar in self.bars) else 1

    def as_dict(self) -> dict[str, Any]:
        bars = [asdict(bar) for bar in self.bars]
        return {"bench": self.bench, "machine": machine(), "rows": self.rows, "bars": bars}

    def table(self) -> str:
        """The rows under their keys, then each bar with what it promises."""
        lines = [f"{self.bench} on {machine()}", "", *align(self.rows), ""]
        for bar in self.bars:
            verdict = "holds" if bar.holds else "DOES NOT HOLD"
            lines.append(f"{bar.name}: {bar.value:g} {bar.op} {bar.limit:g}  {verdict}")
        return "\n".join(lines)


def align(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Columns in the order in which keys first appear, numbers to the right."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[str(key) for key in keys], *([shown(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(keys))]
    numeric = [all(not isinstance(row.get(key), str) for row in rows) for key in keys]

    def fit(cell: str, column: int) -> str:
        return cell.rjust(widths[column]) if numeric[column] else cell.ljust(widths[column])

    return ["  ".join(fit(cell, column) for column, cell in enumerate(line)).rstrip() for line in cells]


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,}"


def machine() -> str:
    """Processor, cores and Python, as the machine tells them."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    return f"{cpu}, {len(_cores())} cores, Python {platform.python_version()}"


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def plot(report: Report, file: Path) -> None:
    """Draw every numeric column of the rows as bars, one panel per column; the first text column names them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    text = [key for key, value in report.rows[0].items() if isinstance(value, str)]
    names = [" ".join(str(row.get(key, "")) for key in text) for row in report.rows]
    columns = [key for key in report.rows[0] if key not in text]
    figure, panels = pyplot.subplots(1, len(columns), figsize=(4 * len(columns), 1 + 0.3 * len(names)), squeeze=False)
    for panel, key in zip(panels[0], columns, strict=True):
        panel.barh(names, [row.get(key) or 0 for row in report.rows], color="#4477aa")
        panel.set_title(key)
        panel.invert_yaxis()
        panel.tick_params(labelleft=panel is panels[0][0])
    figure.suptitle(f"{report.bench} on {machine()}")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--plot FILE`, the same for every benchmark."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the rows into FILE (.png, .svg)")
