"""What became of every request, in columns of numbers. Nothing is simulated here."""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[np.float64]

COLUMNS: tuple[str, ...] = (
    "arrival",
    "ok",  # 1: it got all of its tokens
    "items",
    "hits",  # items that an encoder, or the engine that prefilled, had already
    "encode",  # from arrival until the last item was encoded; 0 without encode legs
    "encode_wait",  # the part of it in which the last item was in no process and on no GPU
    "transfer",  # from there until all embeddings were where they are read
    "queue",  # from there (without media: from arrival) until its prefill began
    "ttft",
    "tpot",  # per token after the first; nan if there is no other
    "e2e",
    "attempts",  # legs sent again elsewhere, beyond the first ones
    "decision",  # seconds of this machine's time that drawing its plan took: not simulated
)


class Results:
    """One row per request, in the order in which they ended. Means and percentiles are over those that are ok."""

    def __init__(self) -> None:
        self._columns = {name: array("d") for name in COLUMNS}
        self.paths: list[str] = []  # the label of each request's path; "" for one that got no plan
        self.errors: list[str] = []  # of those that are not ok
        self.used: dict[str, int] = {}  # legs sent, by URL

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, name: str) -> Column:
        """A column of COLUMNS, ok or not."""
        return np.frombuffer(self._columns[name]) if self.paths else np.empty(0)

    def add(self, path: str, row: tuple[float, ...]) -> None:
        """`row` in the order of COLUMNS."""
        self.paths.append(path)
        for column, value in zip(self._columns.values(), row, strict=True):
            column.append(value)

    def served(self, name: str) -> Column:
        """The column, of the requests that were served and have such a number."""
        values = self[name]
        return np.compress((self["ok"] == 1.0) & ~np.isnan(values), values)

    def mean(self, name: str) -> float:
        values = self.served(name)
        return float(values.mean()) if len(values) else float("nan")

    def percentile(self, name: str, percent: float) -> float:
        values = self.served(name)
        return float(np.percentile(values, percent)) if len(values) else float("nan")

    def share(self, path: str) -> float:
        """Of all requests, those that took this path."""
        return self.paths.count(path) / len(self.paths) if self.paths else 0.0

    def throughput(self) -> float:
        """Requests served per second, from the first arrival to the last end."""
        if not self.paths:
            return 0.0
        arrival = self["arrival"]
        span = float((arrival + self["e2e"]).max() - arrival.min())
        return float(self["ok"].sum()) / span if span else 0.0
