"""Sequences that a language engine's runner is stepped through by hand, and works that are measured in turns."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median

from engines.language.runner import Runner
from engines.language.sequence import SamplingParams, Scheduled, Sequence

Work = Callable[[], float]  # does it once; seconds


@dataclass(frozen=True)
class Ours:
    """The language engine's model side, with a cache that holds every benchmark's sequences."""

    runner: Runner
    blocks: itertools.count[int] = field(default_factory=itertools.count)

    def sequences(self, count: int, prompt: list[int], room: int) -> list[Sequence]:
        """Fresh sequences with blocks for `room` more tokens each; blocks are used round and round."""
        layout = self.runner.cache.layout
        need = -(-(len(prompt) + room) // layout.block_size)
        tables = [[next(self.blocks) % layout.num_blocks for _ in range(need)] for _ in range(count)]
        params = SamplingParams(max_tokens=room, temperature=0.0, ignore_eos=True)
        return [
            Sequence(f"s{n}", list(prompt), len(prompt), params, block_table=table) for n, table in enumerate(tables)
        ]

    def step(self, sequences: list[Sequence]) -> None:
        """Run everything that is not computed yet, and append the sampled tokens."""
        batch = [Scheduled(seq, seq.num_computed, seq.remaining, sample=True) for seq in sequences]
        for seq, sampled in zip(sequences, self.runner.run(batch), strict=True):
            seq.num_computed = seq.num_tokens
            seq.token_ids.append(sampled.token_id)

    def steps(self, sequences: list[Sequence], count: int) -> None:
        for _ in range(count):
            self.step(sequences)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def prefill(ours: Ours, prompt: list[int]) -> Work:
    """Seconds for one step over a whole prompt."""

    def work() -> float:
        sequences = ours.sequences(1, prompt, room=1)
        return timed(lambda: ours.step(sequences))

    return work


def decode(ours: Ours, batch: int, prompt: list[int], steps: int) -> Work:
    """Seconds for `steps` tokens of each of `batch` sequences, prefill not counted."""

    def work() -> float:
        sequences = ours.sequences(batch, prompt, room=steps + 1)
        for sequence in sequences:
            ours.step([sequence])
        return timed(lambda: ours.steps(sequences, steps))

    return work


def interleave(works: Mapping[str, Work], repeats: int) -> dict[str, float]:
    """Median seconds of each, after one unmeasured turn; the order turns round each time, so none is always second."""
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats):
        for name in list(works)[:: 1 if turn % 2 else -1]:
            seconds[name].append(works[name]())
    return {name: median(values) for name, values in seconds.items()}
