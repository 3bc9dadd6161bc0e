"""How much of a KV transfer stays visible after the prefill: layer-wise push beside pushing everything afterwards.

One process prefills with the language engine's runner and pushes over a real transport into the memory of another.
The receiver is *told* that all is there so long after the end of the computation, by the clock that both share; or
before it, where that is negative, and then nothing of the transfer is *exposed*. Modes:

    after      everything, once the whole prompt is computed
    layers 1   each layer as soon as its KV is written
    layers N   groups of N layers

A last layer's KV is there before its attention, its MLP and the head are computed, and so is the word that it is.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import uvloop

from bench.report import Report, add_arguments
from engines.language.kv import KVCache, KVLayout
from engines.language.model import LanguageModel, ModelFacts
from engines.language.runner import Runner
from engines.language.sequence import SamplingParams, Scheduled, Sequence
from engines.tiny import make
from engines.transfer import create
from engines.transfer.base import Arena, Push, Transfer

BLOCK_SIZE = 16
LAYERS = 12
CHUNK = 512
TIMEOUT = 60.0

# Bars, of the grouped mode.
EXPOSED = 0.02  # of the prefill's time
HIDDEN = 98.0  # percent of what stays exposed when everything is pushed afterwards


def layout_of(facts: ModelFacts, tokens: int) -> KVLayout:
    blocks = -(-tokens // BLOCK_SIZE)
    return KVLayout(facts.num_layers, blocks, BLOCK_SIZE, facts.num_kv_heads, facts.head_dim, torch.float32)


def receiver(pipe: Connection, transport: str, nbytes: int) -> None:
    """The other process: reserves its whole arena once per request on the pipe, and says when the bytes are there."""

    async def serve() -> None:
        transfer = create(transport, host="127.0.0.1")
        arena = transfer.allocate("kv", nbytes)
        await transfer.start()
        pipe.send("ready")
        try:
            while await asyncio.to_thread(pipe.recv) == "offer":
                freed = asyncio.Event()
                ticket = transfer.reserve(arena, [(0, nbytes)], timeout=TIMEOUT, on_free=freed.set)
                pipe.send(ticket.offer())
                await ticket.wait()
                pipe.send(time.monotonic())
                ticket.release()
                await freed.wait()
        finally:
            await transfer.close()

    uvloop.run(serve())  # as engines do


@dataclass(frozen=True)
class Sender:
    """The prefill side: a runner whose cache lies in the transfer's arena."""

    runner: Runner
    layout: KVLayout
    transfer: Transfer
    arena: Arena
    pipe: Connection

    async def push(self, tokens: int, layers: int | None) -> tuple[float, float]:
        """Prefill `tokens` and push them; `layers` per write, None for all at the end. Seconds: of computing, and from
        its end until the receiver was told."""
        self.pipe.send("offer")
        push = await self.transfer.open(await asyncio.to_thread(self.pipe.recv), timeout=TIMEOUT)
        blocks = list(range(-(-tokens // BLOCK_SIZE)))
        began, ended = await asyncio.to_thread(self._compute, push, tokens, blocks, layers)
        if layers is None:
            self._write(push, range(self.layout.num_layers), blocks, last=True)
        await push.finish()
        told = await asyncio.to_thread(self.pipe.recv)
        push.release(lambda: None)
        return ended - began, told - ended

    def _compute(self, push: Push, tokens: int, blocks: list[int], layers: int | None) -> tuple[float, float]:
        """When it began and ended."""
        self.runner.layers_per_push = layers or self.layout.num_layers
        prompt = [index % 200 for index in range(tokens)]
        sequence = Sequence("s", prompt, tokens, SamplingParams(max_tokens=1, temperature=0.0), block_table=blocks)
        began = time.monotonic()
        for start in range(0, tokens, CHUNK):
            count = min(CHUNK, tokens - start)
            touched = blocks[start // BLOCK_SIZE : -(-(start + count) // BLOCK_SIZE)]
            on_layers = self._writer(push, touched, start + count == tokens) if layers else None
            self.runner.run([Scheduled(sequence, start, count, sample=start + count == tokens)], on_layers)
            sequence.num_computed += count
        return began, time.monotonic()

    def _writer(self, push: Push, blocks: list[int], ends: bool) -> Callable[[int, int], None]:
        def written(first: int, last: int) -> None:
            self._write(push, range(first, last), blocks, ends and last == self.layout.num_layers)

        return written

    def _write(self, push: Push, layers: range, blocks: list[int], last: bool) -> None:
        spans = self.layout.spans(layers, blocks)
        push.write(self.arena, spans, spans, last=last)


@asynccontextmanager
async def connected(folder: Path, transport: str, tokens: int) -> AsyncIterator[Sender]:
    model = LanguageModel.load(folder, torch.float32)
    layout = layout_of(model.facts, tokens)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=receiver, args=(theirs, transport, layout.nbytes))
    process.start()
    transfer = create(transport, host="127.0.0.1")
    try:
        arena = transfer.allocate("kv", layout.nbytes)
        await transfer.start()
        assert await asyncio.to_thread(ours.recv) == "ready"
        yield Sender(Runner(model, KVCache(layout, arena.buffer)), layout, transfer, arena, ours)
        ours.send("end")
        process.join(10)
    finally:
        await transfer.close()
        if process.is_alive():
            process.kill()
        process.join(10)


async def measure(arguments: argparse.Namespace) -> Report:
    report = Report("overlap")
    folder = arguments.model or make("qwen3_vl", Path(".checkpoints/overlap"), layers=LAYERS)
    modes: dict[str, int | None] = {"after": None, "layers 1": 1, f"layers {arguments.group}": arguments.group}
    for transport in arguments.transports.split(","):
        async with connected(folder, transport, max(arguments.tokens)) as sender:
            for tokens in arguments.tokens:
                report.progress(f"{transport}, {tokens} tokens")
                await compare(report, sender, transport, tokens, modes, arguments.repeats)
    return report


async def compare(
    report: Report, sender: Sender, transport: str, tokens: int, modes: dict[str, int | None], repeats: int
) -> None:
    """Measure the modes in turns; one row each, and bars for the last of them."""
    samples: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
    for turn in range(repeats + 1):
        for mode, layers in modes.items():
            sample = await sender.push(tokens, layers)
            if turn:  # the first turn warms up
                samples[mode].append(sample)
    told = {mode: median(seconds for _, seconds in taken) for mode, taken in samples.items()}
    exposed = {mode: max(0.0, seconds) for mode, seconds in told.items()}
    nbytes = tokens * sender.layout.num_layers * sender.layout.block_nbytes // BLOCK_SIZE
    for mode, taken in samples.items():
        row: dict[str, Any] = {"transport": transport, "mode": mode, "tokens": tokens, "MB": round(nbytes / 1e6, 1)}
        row["compute_ms"] = round(median(seconds for seconds, _ in taken) * 1e3, 1)
        row["told_ms"] = round(told[mode] * 1e3, 2)
        row["exposed_ms"] = round(exposed[mode] * 1e3, 2)
        row["hidden_percent"] = round(hidden(exposed, mode), 1)
        report.row(**row)
    grouped = list(modes)[-1]
    computing = median(seconds for seconds, _ in samples[grouped])
    report.bar(f"{transport} {tokens}: exposed / prefill", exposed[grouped] / computing, EXPOSED)
    report.bar(f"{transport} {tokens}: percent hidden", hidden(exposed, grouped), HIDDEN, ">=")


def hidden(exposed: Mapping[str, float], mode: str) -> float:
    """Percent of the seconds that a push afterwards leaves exposed."""
    return 100 * (1 - exposed[mode] / exposed["after"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.overlap", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help=f"checkpoint folder; default: a tiny one with {LAYERS} layers")
    parser.add_argument("--transports", default="shm,mooncake,zmq", help="comma-separated")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--group", type=int, default=4, help="layers per write in the grouped mode")
    parser.add_argument("--repeats", type=int, default=3)
    add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.exit(uvloop.run(measure(arguments)).emit(arguments))


if __name__ == "__main__":
    main()
