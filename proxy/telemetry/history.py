"""What ended in each span of the last minutes, over all workers: counts, sums and histograms, for charts. Clock-free.

Each worker writes rows of its own in memory that all of them read, one row for each span of time, over and over:

    number   which span the row is of, counted from boot, plus one; 0: none yet
    sums     by `Sum`
    paths    requests by path
    ttft     counts by bucket of the time to the first token
    e2e      counts by bucket of the whole time

Bucket b holds what took up to 1 ms · 2^(b/4): a quantile is off by less than a tenth. Times are seconds of the
monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, auto

import numpy as np
from numpy.typing import NDArray

from proxy.core import Path
from proxy.record import Record

SPAN_S = 2.0
SPANS = 300
WINDOW = 5  # spans that one point of a curve tells of

_FINEST_S = 1e-3
_STEPS = 4  # buckets for each doubling
_BUCKETS = 74  # to 312 s; the last has all above
_CELL = 8

Floats = NDArray[np.float64]


class Sum(IntEnum):
    """Which sum of a row. Times are in seconds."""

    SERVED = 0
    LEFT = auto()  # clients that did not wait for the end
    REFUSED = auto()  # 4xx
    FAILED = auto()  # 5xx, also after the first byte
    ITEMS = auto()  # that encoders encoded
    TOKENS = auto()  # of answers
    STREAMED = auto()  # tokens of streams, without each one's first
    STREAM_TIME = auto()
    ENCODED = auto()  # requests that encoders had a part in
    ENCODE_TIME = auto()
    PREFILLED = auto()  # requests that prefill engines had a part in
    PREFILL_TIME = auto()


_RATES = (Sum.SERVED, Sum.LEFT, Sum.REFUSED, Sum.FAILED, Sum.ITEMS, Sum.TOKENS)
_MEANS = {
    "encode": (Sum.ENCODE_TIME, Sum.ENCODED),
    "prefill": (Sum.PREFILL_TIME, Sum.PREFILLED),
    "token": (Sum.STREAM_TIME, Sum.STREAMED),
}

# Cells of a row, as numbers: arithmetic with an enum's members would cost more than all else at a request's end.
_SUMS = [1 + what for what in Sum]
_SERVED, _LEFT, _REFUSED, _FAILED, _ITEMS, _TOKENS, _STREAMED, _STREAM_TIME, *_OF_STAGES = _SUMS
_ENCODED, _ENCODE_TIME, _PREFILLED, _PREFILL_TIME = _OF_STAGES
_PATHS = {path.label: cell for cell, path in enumerate(Path, 1 + len(Sum))}
_TTFT = 1 + len(Sum) + len(_PATHS)
_E2E = _TTFT + _BUCKETS
_WIDTH = _E2E + _BUCKETS
_EDGES = [_FINEST_S * 2 ** (bucket / _STEPS) for bucket in range(_BUCKETS - 1)]


@dataclass(frozen=True, slots=True)
class Curves:
    """Points in time, the last one a whole span: `columns` has one number for each, nan where there is nothing to tell.

    A point at span n tells of the `WINDOW` spans up to it, its rates per second.
    """

    last: int  # the last point's span, counted from boot
    columns: Mapping[str, Floats]


class History:
    """One worker's view of all rows. Only ever used on the event loop."""

    def __init__(self, buffer: bytearray | memoryview, workers: int = 1, worker: int = 0) -> None:
        memory = memoryview(buffer)[: size(workers)]
        self._cells = memory.cast("d")
        self._all = np.frombuffer(memory, np.float64).reshape(workers, SPANS, _WIDTH)
        self._mine = worker * SPANS * _WIDTH

    def ended(self, record: Record) -> None:
        """A request has ended, at `record.ended`."""
        cells, row, timings = self._cells, self._row(int(record.ended / SPAN_S)), record.timings
        status = record.status
        outcome = _SERVED if status < 400 else _LEFT if status == 499 else _REFUSED if status < 500 else _FAILED
        cells[row + outcome] += 1
        if record.path in _PATHS:
            cells[row + _PATHS[record.path]] += 1
        if "ttft" in timings:
            cells[row + _TTFT + bisect_left(_EDGES, timings["ttft"])] += 1
            cells[row + _E2E + bisect_left(_EDGES, record.ended - record.began)] += 1
            tokens = record.output_tokens
            cells[row + _TOKENS] += tokens
            if record.stream and tokens > 1:
                cells[row + _STREAMED] += tokens - 1
                cells[row + _STREAM_TIME] += record.ended - record.first
        if "prefill" in timings:
            cells[row + _PREFILLED] += 1
            cells[row + _PREFILL_TIME] += timings["prefill"]
        if "encode" in timings:
            cells[row + _ITEMS] += record.items
            cells[row + _ENCODED] += 1
            cells[row + _ENCODE_TIME] += timings["encode"]

    def _row(self, span: int) -> int:
        """Where this worker's row of that span begins; what it held of an earlier one is gone."""
        row = self._mine + span % SPANS * _WIDTH
        if self._cells[row] != span + 1:
            self._all.reshape(-1)[row : row + _WIDTH] = 0.0
            self._cells[row] = span + 1
        return row

    def curves(self, now: float, points: int = SPANS - WINDOW) -> Curves:
        """The latest so many points, of all workers."""
        last = int(now / SPAN_S) - 1
        spans = np.arange(last - points - WINDOW + 1, last + 1)
        rows = self._all[:, spans % SPANS]  # a copy: [worker, span, cell]
        rows[rows[:, :, 0] != spans + 1] = 0.0
        totals = np.cumsum(rows[:, :, 1:].sum(axis=0), axis=0)
        return Curves(last, _curves(totals[WINDOW:] - totals[:-WINDOW]))


def _curves(windows: Floats) -> dict[str, Floats]:
    """`windows` is [point, cell], without the rows' numbers."""
    ttft, e2e = windows[:, _TTFT - 1 : _E2E - 1], windows[:, _E2E - 1 :]
    with np.errstate(divide="ignore", invalid="ignore"):
        means = {name: windows[:, time] / windows[:, count] for name, (time, count) in _MEANS.items()}
    return {
        **{what.name.lower(): windows[:, what] / (SPAN_S * WINDOW) for what in _RATES},
        **{path: windows[:, cell - 1] / (SPAN_S * WINDOW) for path, cell in _PATHS.items()},
        **means,
        **{f"ttft_p{percent}": _quantiles(ttft, percent / 100) for percent in (50, 95, 99)},
        **{f"e2e_p{percent}": _quantiles(e2e, percent / 100) for percent in (50, 95)},
    }


def _quantiles(counts: Floats, share: float) -> Floats:
    """Of each row of counts by bucket; nan for a row of none. Within a bucket, what it holds is evenly spread."""
    sums = np.cumsum(counts, axis=1)
    rank = share * sums[:, -1:]
    bucket = (sums < rank).sum(axis=1)
    points = np.arange(len(counts))
    held = counts[points, bucket]
    below = sums[points, bucket] - held
    with np.errstate(divide="ignore", invalid="ignore"):
        part = (rank[:, 0] - below) / held
    return _FINEST_S * np.exp2((bucket - 1 + part) / _STEPS)  # type: ignore[no-any-return]


def size(workers: int) -> int:
    """Bytes of the memory that so many workers share."""
    return _CELL * workers * SPANS * _WIDTH


def alone() -> History:
    """Of one worker, in this process's own memory."""
    return History(bytearray(size(1)))
