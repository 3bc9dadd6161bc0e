"""Sends what was done for sampled requests to an OpenTelemetry collector. Nothing of it runs while a request is served.

    ended ─▶ queue ─▶ a thread: spans, in batches ─▶ collector

A collector that is slow or dead costs a bounded queue, and then the traces: they are counted as dropped.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from proxy.record import Record
from proxy.telemetry import trace
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.trace import Dice, Trace

if TYPE_CHECKING:  # it needs an extra, and memory
    from proxy.telemetry.spans import Exporter

log = logging.getLogger(__name__)

_QUEUE = 4096  # records
_BATCH = 256  # records: about a thousand spans
_EVERY_S = 1.0
_TIMEOUT_S = 5.0  # of an export, with its retries
_LAST_S = 2.0  # for what is left when the proxy ends
_TURN_S = 0.0005  # Python's own 5 ms are what each stream would wait for its next token while spans are made


class Tracing:
    """`running()` sends, within. One for a process, used on its event loop."""

    def __init__(self, url: str, share: float, metrics: Metrics, dice: Dice = random.getrandbits) -> None:
        """`url`: the collector, or its path for traces; `share`: of the traces that begin here, how much is sampled."""
        self._url = url if url.endswith("/v1/traces") else url.rstrip("/") + "/v1/traces"
        self._share = share
        self._dice = dice
        self._exported, self._dropped = (metrics.spans.labels(result) for result in ("exported", "dropped"))
        self._queue: deque[tuple[Record, float]] = deque()
        self._wake = threading.Event()
        self._over = False

    def begin(self, headers: Mapping[str, str]) -> Trace:
        """The context of a request that came with `headers`."""
        return trace.begin(headers.get("traceparent", ""), self._share, self._dice)

    def ended(self, record: Record) -> None:
        """The request of `record` is over: nothing of it changes any more."""
        if record.trace is None or not record.trace.sampled:
            return
        if len(self._queue) >= _QUEUE:
            self._dropped.inc(_size(record))
            return
        self._queue.append((record, time.time() - time.monotonic()))  # noqa: TID251 - spans are told the time of day
        if len(self._queue) == _BATCH:
            self._wake.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Leaving sends what is left, for two seconds at most."""
        from proxy.telemetry.spans import Exporter  # here: whoever traces nothing shall not load it

        exporter = Exporter(self._url, f"{socket.gethostname()}:{os.getpid()}", _TIMEOUT_S)
        arguments = exporter, asyncio.get_running_loop()
        thread = threading.Thread(target=self._send, args=arguments, name="traces", daemon=True)
        turn = sys.getswitchinterval()
        sys.setswitchinterval(_TURN_S)
        thread.start()
        try:
            yield
        finally:
            sys.setswitchinterval(turn)
            self._over = True
            self._wake.set()
            await asyncio.to_thread(thread.join, _LAST_S)
            exporter.close()

    # ---- in the thread

    def _send(self, exporter: Exporter, loop: asyncio.AbstractEventLoop) -> None:
        taken = True
        while not self._over or self._queue:
            self._wake.wait(_EVERY_S)
            self._wake.clear()
            while batch := self._batch():
                before, taken = taken, exporter.export(batch)
                counter = self._exported if taken else self._dropped
                with suppress(RuntimeError):  # the loop is closed: nobody reads its counters any more
                    loop.call_soon_threadsafe(counter.inc, sum(_size(record) for record, _ in batch))
                if taken is not before:
                    self._tell(taken)

    def _batch(self) -> list[tuple[Record, float]]:
        return [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]

    def _tell(self, taken: bool) -> None:
        if taken:
            log.info("%s takes traces again", self._url)
        else:
            log.warning("%s does not take traces: they are dropped until it does", self._url)


def _size(record: Record) -> int:
    """How many spans it becomes."""
    return 1 + len(record.legs)
