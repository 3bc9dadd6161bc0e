"""The model thread and the way into it: schedule, run, postprocess. It knows no HTTP, no text and no transport.

Commands go in by a queue and are obeyed between two steps; what happened comes out by one call on the loop per step.
The scheduler and every sequence belong to the model thread; a `Stream` belongs to the loop.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Collection
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from engines.errors import ShuttingDown
from engines.language.failures import broken
from engines.language.mirror import Ready
from engines.language.scheduler import Limits, NeverFits, Scheduler, Step
from engines.language.sequence import Scheduled, Sequence, Status
from engines.language.stopping import finish_reason
from engines.language.stream import Stream, Token
from engines.transfer.base import TransferError

log = logging.getLogger(__name__)

GOING = "this engine is shutting down: send the request to another"

CHECK_S = 30.0
"""Until the step that runs is over, and nobody is told anything before its end: longer than any step takes."""

Sink = Callable[[Scheduled, int, int], None]
"""`(entry, first, last)`: the KV of layers first to last - 1 is written for the entry's tokens. In the model thread."""


class Sampled(Protocol):
    """What the runner returns for an entry that samples."""

    @property
    def token_id(self) -> int: ...
    @property
    def logprob(self) -> float | None: ...
    @property
    def top_logprobs(self) -> tuple[tuple[int, float], ...]: ...


class Runner(Protocol):
    """Runs a batch and returns one result per entry that samples, in order. May raise anything."""

    def run(self, batch: Listing[Scheduled], on_layers: Callable[[int, int], None] | None) -> Listing[Sampled]: ...


class Cache(Protocol):
    """Where the KV lies. `restore` puts back, into any blocks, what `save` returned."""

    def load(self, blocks: Listing[int]) -> None:
        """A transfer has brought the KV of these blocks to where transfers write."""

    def copy_block(self, source: int, target: int) -> None: ...
    def save(self, blocks: Listing[int]) -> Any: ...
    def restore(self, saved: Any, blocks: Listing[int]) -> None: ...


@dataclass(frozen=True, slots=True)
class Stats:
    """What /info and /metrics show: how things stood when a step began or ended."""

    waiting: int = 0
    running: int = 0
    remote: int = 0
    swapped: int = 0
    free_blocks: int = 0
    preemptions: int = 0


@dataclass(slots=True, eq=False)
class Request:
    """All choices of one request, the first of which runs the prompt."""

    first: Sequence
    sink: Sink | None
    on_prefilled: Callable[[], None]
    choices: list[Sequence]
    stream: Stream = field(init=False)
    error: Exception | None = None  # of its sink, which must not break the batch
    prefilled: bool = False
    reported: int | None = None  # how much of the prompt is computed, as `on_computed` knows it


class LanguageEngine:
    """Made and used on the loop. `start` before the first `submit`, `close` at the end."""

    def __init__(self, limits: Limits, runner: Runner, cache: Cache, eos_token_ids: Collection[int] = ()) -> None:
        self.limits = limits
        self.stats = Stats(free_blocks=limits.num_blocks)
        self._runner = runner
        self._cache = cache
        self._eos = frozenset(eos_token_ids)
        self._scheduler = Scheduler(limits)
        self._requests: dict[Sequence, Request] = {}  # by each of their choices
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._outbox: list[Callable[[], None]] = []
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    # -- on the loop --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self, timeout: float = 10.0) -> None:
        """Fail what is open and end the thread, which may be in a step; it is left behind after `timeout` seconds."""
        self._closed = True
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, timeout)
        if self._thread.is_alive():
            log.error("the model thread did not end within %g s", timeout)

    def submit(
        self, seq: Sequence, *, sink: Sink | None = None, on_prefilled: Callable[[], None] = lambda: None
    ) -> Stream:
        """Queue a sequence whose limits have been checked.

        `on_prefilled` is called once, on the loop, when its embeddings are not needed any more, whatever happened.
        """
        if self._closed:
            raise ShuttingDown(GOING)
        request = Request(seq, sink, on_prefilled, [seq])
        request.stream = Stream(
            abort=lambda: self._commands.put(partial(self._abort, request)),
            stop=lambda index: self._commands.put(partial(self._stop, request, index)),
        )
        self._commands.put(partial(self._add, request))
        return request.stream

    def arrived(self, seq: Sequence) -> None:
        """The KV of a sequence with Handoff.RECEIVE is in its blocks."""
        self._commands.put(partial(self._arrived, seq))

    def embedded(self, seq: Sequence, embeddings: object, held_at: int | None) -> None:
        """More of its embeddings are here: from now on it has these, and runs as far as `held_at`. At any time."""
        self._commands.put(partial(self._embedded, seq, embeddings, held_at))

    def unpin(self, seq: Sequence, copies: Listing[Ready] = ()) -> None:
        """No transfer can touch the blocks of a sequence that is handed over, once these `copies` of them are over,
        as they are unless it failed. Idempotent.
        """
        self._commands.put(partial(self._unpin, seq, copies))

    async def check(self) -> None:
        """Between two steps: whether every block belongs to exactly those who say so. Raises RuntimeError if not."""
        if self._closed:
            raise ShuttingDown(GOING)
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._commands.put(partial(self._check, told))
        async with asyncio.timeout(CHECK_S):
            await told

    @property
    def queued(self) -> int:
        """Sequences that hold nothing yet."""
        return self.stats.waiting + self._commands.qsize()

    # -- in the model thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        busy = False
        while True:
            try:
                if not self._obey(wait=not busy):
                    break
                busy = self._step()
            except Exception as error:  # noqa: BLE001 - the edge of the model thread, which must outlive any step
                busy = self._recover(error)
            self._flush()
        for request in set(self._requests.values()):
            self._fail(request, ShuttingDown(GOING))
        self._flush()

    def _step(self) -> bool:
        """Schedule, run, postprocess. False when nothing can run until a command comes."""
        step = self._scheduler.schedule()
        self._announce(step)
        self._swap(step)
        self._postprocess(self._compute(step.scheduled))
        self._report()
        if self._scheduler.idle:
            self._scheduler.check()
        return bool(step)

    def _obey(self, wait: bool) -> bool:
        """Carry out the commands that are there, after waiting for one if `wait`. False: the engine is to end."""
        while wait or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command()
            wait = False
        return True

    def _swap(self, step: Step) -> None:
        for swap in step.swap_out:
            swap.seq.host_copy = self._cache.save(swap.blocks) if swap.blocks else None
        for swap in step.swap_in:
            if swap.blocks:
                self._cache.restore(swap.seq.host_copy, swap.blocks)
            swap.seq.host_copy = None

    def _announce(self, step: Step) -> None:
        """Now, and not after the step: another engine waits for the blocks, and /info shows who runs."""
        for seq in step.admitted:
            self._emit(partial(self._requests[seq].stream.on_blocks, tuple(seq.block_table)))
        self._flush()

    def _compute(self, batch: Listing[Scheduled]) -> list[tuple[Scheduled, Sampled | None]]:
        """Run the batch. If that fails, run its entries one by one, to fail only those that are to blame."""
        if not batch:
            return []
        try:
            sampled = iter(self._runner.run(batch, self._layer_sink(batch)))
        except Exception as error:  # noqa: BLE001 - the edge to the model, which may raise anything
            if len(batch) == 1:
                self._fail(self._requests[batch[0].seq], error)
                return []
            log.warning("a step of %d sequences failed (%r); running them one by one", len(batch), error)
            return [pair for entry in batch if entry.seq in self._requests for pair in self._compute([entry])]
        return [(entry, next(sampled) if entry.sample else None) for entry in batch]

    def _layer_sink(self, batch: Listing[Scheduled]) -> Callable[[int, int], None] | None:
        receivers = [(request, entry) for entry in batch if (request := self._requests[entry.seq]).sink]
        if not receivers:
            return None

        def on_layers(first: int, last: int) -> None:
            for request, entry in receivers:
                try:
                    if request.error is None and request.sink is not None:
                        request.sink(entry, first, last)
                except TransferError as error:
                    request.error = error

        return on_layers

    def _postprocess(self, results: list[tuple[Scheduled, Sampled | None]]) -> None:
        for entry, sampled in results:
            request = self._requests.get(entry.seq)
            if request is None:
                continue  # another choice of its request has just failed
            self._scheduler.advance(entry, None if sampled is None else sampled.token_id)
            if request.error is not None:
                self._fail(request, request.error)
            elif sampled is not None:
                self._take(request, entry.seq, sampled)

    def _take(self, request: Request, seq: Sequence, sampled: Sampled) -> None:
        """One more token of one choice."""
        reason = finish_reason(seq, self._eos)
        token = Token(seq.index, sampled.token_id, sampled.logprob, sampled.top_logprobs, reason)
        self._emit(partial(request.stream.on_token, token))
        self._prefilled(request)
        if seq.spare_blocks:
            self._fork(request)
        if reason is not None:
            self._drop(request, seq)

    def _report(self) -> None:
        """Tell how far the running prompts are, as soon as they run: what is computed needs no embedding any more."""
        for seq in self._scheduler.running:
            request = self._requests[seq]
            if seq.on_computed is not None and request.reported != seq.num_computed and not request.prefilled:
                request.reported = seq.num_computed
                self._emit(partial(seq.on_computed, seq.num_computed))

    def _prefilled(self, request: Request) -> None:
        if not request.prefilled:
            request.prefilled = True
            request.first.embeddings = None
            self._emit(partial(request.stream.on_prefilled, request.first.num_cached))
            self._emit(request.on_prefilled)

    def _fork(self, request: Request) -> None:
        forks, copies = self._scheduler.fork(request.first)
        for source, target in copies:
            self._cache.copy_block(source, target)
        request.choices += forks
        self._requests.update(dict.fromkeys(forks, request))

    def _drop(self, request: Request, seq: Sequence) -> None:
        self._scheduler.drop(seq)
        if self._requests.pop(seq, None) is None:
            return
        request.choices.remove(seq)
        if not request.choices:
            self._emit(request.stream.on_end)

    # -- commands -----------------------------------------------------------------------------------------------------

    def _add(self, request: Request) -> None:
        self._requests[request.first] = request
        try:
            self._scheduler.add(request.first)
        except NeverFits as error:
            self._fail(request, error)

    def _arrived(self, seq: Sequence) -> None:
        if seq.status is Status.REMOTE:
            self._cache.load(seq.block_table)
            self._scheduler.arrived(seq)

    def _unpin(self, seq: Sequence, copies: Listing[Ready]) -> None:
        for ready in copies:
            ready()
        self._scheduler.unpin(seq)

    def _embedded(self, seq: Sequence, embeddings: object, held_at: int | None) -> None:
        if seq.status is not Status.FINISHED:
            seq.embeddings, seq.held_at = embeddings, held_at

    def _check(self, told: asyncio.Future[None]) -> None:
        try:
            self._scheduler.check()
        except RuntimeError as error:
            self._emit(partial(_settle, told, error))
        else:
            self._emit(partial(_settle, told))

    def _abort(self, request: Request) -> None:
        for seq in list(request.choices):
            self._drop(request, seq)
        self._prefilled(request)

    def _stop(self, request: Request, index: int) -> None:
        for seq in [seq for seq in request.choices if seq.index == index]:
            self._drop(request, seq)

    def _fail(self, request: Request, error: Exception) -> None:
        told = broken(error)
        if told.__cause__ is not None:
            log.error("request %s failed", request.first.id, exc_info=error)
        for seq in request.choices:
            self._scheduler.drop(seq)
            self._requests.pop(seq, None)
        request.choices = []
        self._emit(partial(request.stream.on_end, told))
        self._prefilled(request)

    def _recover(self, error: Exception) -> bool:
        """A step broke outside the model: fail what was in it, or on its way to or from host memory.

        True: the next step may be tried at once, because it will be another one.
        """
        log.critical("the engine's step failed", exc_info=error)
        doomed = [*self._scheduler.running, *self._scheduler.returning]
        for request in {self._requests[seq] for seq in doomed if seq in self._requests}:
            self._fail(request, error)
        return bool(doomed)

    # -- out ----------------------------------------------------------------------------------------------------------

    def _emit(self, call: Callable[[], None]) -> None:
        self._outbox.append(call)

    def _flush(self) -> None:
        scheduler = self._scheduler
        self.stats = Stats(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            remote=len(scheduler.remote),
            swapped=len(scheduler.returning),
            free_blocks=scheduler.blocks.num_free,
            preemptions=scheduler.preemptions,
        )
        if self._outbox and self._loop is not None:
            calls, self._outbox = self._outbox, []
            self._loop.call_soon_threadsafe(_call_all, calls)


def _settle(told: asyncio.Future[None], error: Exception | None = None) -> None:
    if told.done():
        return  # nobody waits any more
    if error is None:
        told.set_result(None)
    else:
        told.set_exception(error)


def _call_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()
