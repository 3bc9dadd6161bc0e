"""The runner and the cache of an engine with several ranks: rank 0's own, and word to the others of each thing that is
done to them. It decides nothing; the other side is in `follower`.

A step is packed here and computed everywhere. What fails in packing is a request's own fault, and nobody hears of it;
what fails in computing leaves the others in the middle of a step, and is the end of the engine.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Listing
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Protocol

import msgspec
import torch

from engines.dtypes import name_of
from engines.errors import ShuttingDown
from engines.language.engine import Cache
from engines.language.kv import KVLayout
from engines.language.mirror import Ready
from engines.language.parallel.group import Group
from engines.language.parallel.messages import (
    Command,
    CopyBlock,
    Errands,
    Forget,
    Load,
    Restore,
    Rows,
    Save,
    Share,
    Stage,
    Step,
    Write,
    packed,
)
from engines.language.parallel.wire import Wire
from engines.language.runner import Pack, Patch, Runner
from engines.language.sampler import Sampled
from engines.language.sequence import Scheduled

log = logging.getLogger(__name__)

OnLayers = Callable[[int, int], None]

ENDING = "this engine has lost one of its processes and ends: send the request to another"


class Steps:
    """The way to the other ranks' model threads. Used in rank 0's alone, except that any thread may `end` it."""

    def __init__(self, wires: Listing[Wire], on_failure: Callable[[str], None]) -> None:
        """`on_failure`, called once at most and in any thread, gets the reason why no step can be run any more."""
        self._wires = wires
        self._on_failure = on_failure
        self._encoder = msgspec.msgpack.Encoder()
        self._errands: list[Stage | Write] = []
        self._ended = False
        self.forgotten: list[int] = []

    def tell(self, command: Command) -> None:
        """Raises ShuttingDown."""
        if self._ended:
            raise ShuttingDown(ENDING)
        try:
            if self.forgotten:
                numbers, self.forgotten = self.forgotten, []
                self._send(Forget(numbers))
            self._send(command)
        except OSError as error:
            raise self.failure(error) from None

    def errand(self, errand: Stage | Write) -> None:
        """To be done by the other ranks when they have come as far as this one has."""
        self._errands.append(errand)

    def run_errands(self) -> None:
        errands, self._errands = self._errands, []
        self.tell(Errands(errands))

    def failure(self, error: BaseException) -> ShuttingDown:
        """The ranks are not in step any more: the end. What requests are told."""
        log.error("a step of several ranks failed: %r", error)
        self.end(f"a step of several ranks failed: {error}")
        return ShuttingDown(ENDING)

    def end(self, reason: str) -> None:
        if not self._ended:
            self._ended = True
            self._on_failure(reason)

    def _send(self, command: Command) -> None:
        data = self._encoder.encode(command)
        for wire in self._wires:
            wire.send(data)


class ParallelRunner:
    """A `Runner` for all ranks."""

    def __init__(self, runner: Runner, steps: Steps, group: Group) -> None:
        self._runner = runner
        self._steps = steps
        self._group = group

    @torch.inference_mode()
    def run(self, batch: Listing[Scheduled], on_layers: OnLayers | None) -> list[Sampled]:
        """As `Runner.run`. Raises BadEmbeddings, which is before the others hear of the step, and ShuttingDown."""
        if not batch:
            return []
        pack = self._runner.pack(batch)
        self._steps.tell(step_of(pack, on_layers is not None))
        try:
            patches = tuple(Patch(patch.first, self._spread(patch.rows)) for patch in pack.patches)
            logits = self._runner.forward(replace(pack, patches=patches), self._relayed(on_layers))
        except ShuttingDown:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the others are in the midst of the step
            raise self._steps.failure(error) from None
        return self._runner.sampler.sample(logits, [entry.seq for entry in batch if entry.sample])

    def _spread(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows on the device, and on those of the other ranks. 67 MB of an image took 134 ms through a socket."""
        here = rows.to(self._runner.model.device).contiguous()
        self._group.spread(here)
        return here

    def _relayed(self, on_layers: OnLayers | None) -> OnLayers | None:
        if on_layers is None:
            return None

        def relayed(first: int, last: int) -> None:
            on_layers(first, last)
            self._steps.run_errands()

        return relayed


def step_of(pack: Pack, errands: bool) -> Step:
    return Step(
        packed(pack.token_ids),
        packed(pack.positions),
        [Share(packed(query.block_table), query.start, query.count) for query in pack.queries],
        [Rows(each.first, len(each.rows), each.rows.shape[1], name_of(each.rows.dtype)) for each in pack.patches],
        list(pack.last_rows),
        errands,
    )


class KVStore(Cache, Protocol):
    """What engine and handoffs together ask of a cache."""

    @property
    def layout(self) -> KVLayout: ...
    def stage(self, layers: range, blocks: Listing[int]) -> Ready | None: ...


@dataclass(frozen=True, eq=False)
class Saved:
    """Blocks in host memory: this rank's, and the number under which the others have theirs."""

    own: Any
    number: int


class ParallelCache:
    """A cache for all ranks: the same blocks, of which each has its own heads."""

    def __init__(self, cache: KVStore, steps: Steps) -> None:
        self._cache = cache
        self._steps = steps
        self._numbers: Iterator[int] = count()

    @property
    def layout(self) -> KVLayout:
        return self._cache.layout

    def load(self, blocks: Listing[int]) -> None:
        self._steps.tell(Load(packed(blocks)))
        self._cache.load(blocks)

    def stage(self, layers: range, blocks: Listing[int]) -> Ready | None:
        """During a step."""
        ready = self._cache.stage(layers, blocks)
        if ready is not None:
            self._steps.errand(Stage(layers.start, layers.stop, packed(blocks)))
        return ready

    def copy_block(self, source: int, target: int) -> None:
        self._steps.tell(CopyBlock(source, target))
        self._cache.copy_block(source, target)

    def save(self, blocks: Listing[int]) -> Saved:
        saved = Saved(self._cache.save(blocks), next(self._numbers))
        self._steps.tell(Save(saved.number, packed(blocks)))
        # the list may be another one by then
        weakref.finalize(saved, lambda steps, number: steps.forgotten.append(number), self._steps, saved.number)
        return saved

    def restore(self, saved: Saved, blocks: Listing[int]) -> None:
        self._steps.tell(Restore(saved.number, packed(blocks)))
        self._cache.restore(saved.own, blocks)
