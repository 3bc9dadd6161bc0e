"""Counters that several workers keep and each can tell the sum of: prometheus_client's multiprocess files, by worker.

The files are named after the worker's place, not its process: who takes a dead one's place counts on where that ended,
so that nothing is lost and nothing counted twice. Gauges are different: what a dead process had in flight is over.
Holds no metric of its own.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, values
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead


class _Number:
    """What a Counter, Gauge or Histogram asks of a number: one cell, without the library's lock: used on the event loop
    only."""

    cell: Cell

    def inc(self, amount: float) -> None:
        self.cell[0] += amount

    def set(self, value: float, timestamp: float | None = None) -> None:
        self.cell[0] = value

    def get(self) -> float:
        return self.cell[0]

    def set_exemplar(self, exemplar: object) -> None:
        pass

    def get_exemplar(self) -> None:
        return None


def install_alone() -> None:
    """From now on every metric made in this process counts without the library's locks: on the event loop only."""

    class Value(_Number):
        _multiprocess = False

        def __init__(self, *_: Any, **__: Any) -> None:
            self.cell = [0.0]

    values.ValueClass = Value


def install(folder: Path, worker: int) -> None:
    """From now on every metric made in this process keeps its values in `folder`.

    The library reads both from the environment, once, when it is imported; a worker learns its place after that.
    """
    files: dict[str, MmapedDict] = {}

    def opened(kind: str) -> MmapedDict:
        if kind not in files:
            path = folder / f"{kind}_{worker}.db"
            if not path.exists():  # others read whatever has this name: it must never be half made
                fresh = path.with_suffix(".new")
                MmapedDict(str(fresh)).close()  # type: ignore[no-untyped-call]
                fresh.rename(path)
            files[kind] = MmapedDict(str(path))  # type: ignore[no-untyped-call]
        return files[kind]

    class Value(_Number):
        """A cell of its file, written in place, where the library packs and copies (80 ns against 1.2 µs)."""

        _multiprocess = True

        def __init__(
            self,
            typ: str,
            metric_name: str,
            name: str,
            labelnames: Any,
            labelvalues: Any,
            help_text: str,
            multiprocess_mode: str = "",
            **_: Any,
        ) -> None:
            file = opened(f"{typ}_{multiprocess_mode}" if typ == "gauge" else typ)
            key = mmap_key(metric_name, name, labelnames, labelvalues, help_text)
            file.read_value(key)  # type: ignore[no-untyped-call]  # finds or makes its place
            at = file._positions[key]
            # A file that has grown is mapped again. Writing through the old mapping still reaches it.
            self.cell = memoryview(file._m)[at : at + 8].cast("d")

    values.ValueClass = Value


class Cell(Protocol):
    """One number of a metric, at index 0: what is added there is counted, for a quarter of what a call costs."""

    def __getitem__(self, index: int, /) -> float: ...

    def __setitem__(self, index: int, value: float, /) -> None: ...


def cell(value: Any) -> Cell:
    """Where `value`, a number inside a metric, is kept."""
    found: Cell = value.cell if hasattr(value, "cell") else _Library(value)
    return found


class _Library:
    """A number of the library's own, where nothing was installed."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __getitem__(self, index: int, /) -> float:
        return float(self._value.get())

    def __setitem__(self, index: int, value: float, /) -> None:
        self._value.set(value)


def summed(folder: Path) -> CollectorRegistry:
    """The sums over all workers, as they are when it is collected."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))  # type: ignore[no-untyped-call]
    return registry


def live(folder: Path) -> Counter[str]:
    """What each gauge that is summed over the workers says now, by name: `summed` without reading all the rest."""
    found: Counter[str] = Counter()
    for file in folder.glob("gauge_livesum_*.db"):
        for key, value, *_ in MmapedDict.read_all_values_from_file(str(file)):  # type: ignore[no-untyped-call]
            found[json.loads(key)[1]] += value
    return found


def bury(folder: Path, worker: int) -> None:
    """A worker has died: what it had in flight is over, what it counted stays."""
    mark_process_dead(worker, str(folder))  # type: ignore[no-untyped-call]
