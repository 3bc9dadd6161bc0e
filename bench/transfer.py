"""Every transport between two processes, beside memcpy, raw loopback TCP and the raw uses of Mooncake; interleaved.

A transport's time runs from the first `Push.write` until `Push.finish` returns: all bytes applied and the receiver
told. The raw uses end with a one-byte answer of the receiver for the same reason. Claiming the ticket is not in it.
Storage is publishing plus fetching. Nothing here is tuned per transport: the product's defaults run.

The large shapes are written `STREAM` times per push, as a prefill writes its layers, by every method alike, and the
time is per write; the small one once, which makes it the latency of a whole exchange.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import numpy as np
import uvloop

from bench.report import Report, add_arguments
from bench.transfer_raw import RawPeer, RawReceiver, RawSender, Use, memcpy
from engines.serve import SWITCH_INTERVAL
from engines.transfer import create
from engines.transfer.base import Transfer, TransportUnavailable

ARENA = 64 << 20
BLOCK = 16 << 10
MIB16 = 16 << 20
TIMEOUT = 60.0
STREAM = 28
KEY = "0" * 64
COPYING = ("shm", "mooncake", "zmq")
MEMCPY_LIMIT = 1.3
RAW_LIMIT = 1.1
"""Not slower, with room for the noise of a shared machine."""


@dataclass(frozen=True)
class Shape:
    """What is moved: one span list in the sender's arena, one in the receiver's."""

    name: str
    source: list[tuple[int, int]]
    target: list[tuple[int, int]]

    writes: int = STREAM

    @property
    def nbytes(self) -> int:
        return sum(length for _, length in self.source)


def shapes() -> list[Shape]:
    rng = np.random.default_rng(0)
    source, target = ([(int(b) * BLOCK, BLOCK) for b in rng.permutation(ARENA // BLOCK)[:1000]] for _ in range(2))
    return [
        Shape("16 MiB", [(0, MIB16)], [(MIB16, MIB16)]),
        Shape("1000 x 16 KiB", source, target),
        Shape("4 KiB", [(0, 4096)], [(8192, 4096)], writes=1),
    ]


def make(name: str, folder: str) -> Transfer:
    return create(name, storage_path=folder if name == "storage" else None, timeout=30.0)


def receiver(pipe: Connection, names: list[str], folder: str) -> None:
    """The other process: answers ("offer", transport, spans), ("settle", …) and ("fetch", …) until None."""

    async def serve() -> None:
        async with AsyncExitStack() as stack:
            transfers = {name: make(name, folder) for name in names}
            arenas = {name: transfer.allocate("arena", ARENA) for name, transfer in transfers.items()}
            for transfer in transfers.values():
                await transfer.start()
                stack.push_async_callback(transfer.close)
            raw = stack.enter_context(RawReceiver(ARENA, "mooncake" in names))
            pipe.send(raw.peer)
            while (call := await asyncio.to_thread(pipe.recv)) is not None:
                what, name, spans, where = call
                ticket = transfers[name].reserve(arenas[name], spans, timeout=TIMEOUT, on_free=lambda: None)
                if what == "offer":
                    pipe.send(ticket.offer())
                    await ticket.wait()
                else:
                    await ticket.fetch(where)
                pipe.send(bytes(arenas[name].buffer[spans[-1][0] :][:8]))
                ticket.release()

    uvloop.run(serve())


class Side:
    """The sending process's half of one transport."""

    def __init__(self, transfer: Transfer, pipe: Connection) -> None:
        self.transfer, self._pipe = transfer, pipe
        self.arena = transfer.allocate("arena", ARENA)
        np.frombuffer(self.arena.buffer, dtype=np.uint8)[:] = 7

    async def push(self, shape: Shape) -> float:
        self._pipe.send(("offer", self.transfer.name, shape.target, None))
        push = await self.transfer.open(await asyncio.to_thread(self._pipe.recv), timeout=TIMEOUT)
        began = time.perf_counter()
        for _ in range(shape.writes):
            push.write(self.arena, shape.source, shape.target)
        await push.finish()
        took = (time.perf_counter() - began) / shape.writes
        push.release(lambda: None)
        self._check(await asyncio.to_thread(self._pipe.recv))
        return took

    async def store(self, shape: Shape) -> float:
        began = time.perf_counter()
        where = await self.transfer.publish(
            KEY, self.arena, shape.source, ttl=None, on_free=lambda: None, dtype="uint8", shape=[shape.nbytes]
        )
        self._pipe.send(("fetch", self.transfer.name, shape.target, where))
        answer = await asyncio.to_thread(self._pipe.recv)
        took = time.perf_counter() - began
        self.transfer.withdraw(KEY)
        self._check(answer)
        return took

    @staticmethod
    def _check(got: bytes) -> None:
        if got != b"\x07" * 8:
            raise RuntimeError(f"the bytes that arrived are wrong: {got!r}")


Method = Callable[[Shape], Awaitable[float]]


def synchronous(use: Use) -> Method:
    async def timed(shape: Shape) -> float:
        began = time.perf_counter()
        use(shape.source, shape.target, shape.writes)
        return (time.perf_counter() - began) / shape.writes

    return timed


Times = dict[tuple[str, str], list[float]]
"""Seconds of each repeat, by (method, shape)."""


async def measure(methods: dict[str, Method], repeats: int, report: Report) -> Times:
    """Every repeat runs everything once."""
    times: Times = {}
    warm_up = 2
    for repeat in range(warm_up + repeats):
        report.progress(f"repeat {repeat + 1} of {warm_up + repeats}")
        for shape in shapes():
            for name, method in methods.items():
                took = await method(shape)
                if repeat >= warm_up:
                    times.setdefault((name, shape.name), []).append(took)
    return times


async def run(report: Report, repeats: int, transports: list[str]) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="triptych-bench-"))
        sides = {name: Side(make(name, folder), ours) for name in transports}
        child = context.Process(target=receiver, args=(theirs, transports, folder), daemon=True)
        child.start()
        stack.callback(stop, child, ours)
        for side in sides.values():
            await side.transfer.start()
            stack.push_async_callback(side.transfer.close)
        peer: RawPeer = await asyncio.to_thread(ours.recv)
        raw = stack.enter_context(RawSender(peer, ARENA))
        methods: dict[str, Method] = {"memcpy": synchronous(memcpy(ARENA)), "raw TCP": synchronous(raw.tcp)}
        for name, side in sides.items():
            methods[name] = side.store if name == "storage" else side.push
        if "mooncake" in transports:
            methods |= {f"raw mooncake, {how}": synchronous(use) for how, use in raw.mooncake.items()}
        fill(report, await measure(methods, repeats, report), list(methods))


def stop(child: Any, pipe: Connection) -> None:
    pipe.send(None)
    child.join(10)
    if child.is_alive():
        child.kill()
        child.join()


def fill(report: Report, times: Times, methods: list[str]) -> None:
    """A ratio is the median of what each repeat gave, since the machine's load drifts between them."""
    by_name = {shape.name: shape for shape in shapes()}
    seconds = {key: median(samples) for key, samples in times.items()}

    def ratio(name: str, other: str, shape: str) -> float:
        return median(a / b for a, b in zip(times[name, shape], times[other, shape], strict=True))

    for name in methods:
        for shape in by_name.values():
            took = seconds[name, shape.name]
            report.row(
                transport=name,
                shape=shape.name,
                us=round(took * 1e6, 1),
                gb_per_s=round(shape.nbytes / took / 1e9, 3),
                times_memcpy=round(ratio(name, "memcpy", shape.name), 2),
            )
    for shape_name in ("16 MiB", "1000 x 16 KiB"):
        if "shm" in methods:
            report.bar(f"shm over memcpy, {shape_name}", ratio("shm", "memcpy", shape_name), MEMCPY_LIMIT)
        raw = {name: seconds[name, shape_name] for name in methods if name.startswith("raw mooncake")}
        if raw:
            best = min(raw, key=raw.__getitem__)
            report.bar(f"mooncake over its best raw use, {shape_name}", ratio("mooncake", best, shape_name), RAW_LIMIT)


def usable(name: str, report: Report) -> bool:
    try:
        create(name, storage_path="." if name == "storage" else None)
    except TransportUnavailable as error:
        report.progress(f"left out: {error}")
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.transfer", description=__doc__.split("\n\n")[0])
    add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=21, help="samples per cell; the median counts (default 21)")
    parser.add_argument(
        "--transports", default=",".join((*COPYING, "storage")), help="comma-separated (default: %(default)s)"
    )
    flags = parser.parse_args(arguments)
    report = Report("transfer")
    transports = [name for name in flags.transports.split(",") if usable(name, report)]
    sys.setswitchinterval(SWITCH_INTERVAL)
    uvloop.run(run(report, flags.repeats, transports))
    return report.emit(flags)


if __name__ == "__main__":
    sys.exit(main())
