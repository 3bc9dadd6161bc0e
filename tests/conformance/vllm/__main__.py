"""Every fleet, or those whose names hold one of the words given; exits 1 unless all checks pass."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from deploy.processes import Child
from tests.conformance.vllm.checks import Check, Fleet
from tests.conformance.vllm.engine import FOLDER, Vllm
from tests.conformance.vllm.fleets import Plan, engines, plans
from tests.support.checkpoints import FAMILIES, checkpoint
from tests.support.cluster import Client

CHECK_TIMEOUT = 600.0


@dataclass(frozen=True)
class Row:
    fleet: str
    check: str
    failure: str  # empty: it passed
    seconds: float

    def __str__(self) -> str:
        verdict = "passed" if not self.failure else f"FAILED  {self.failure}"
        return f"{self.fleet:<38} {self.check:<26} {self.seconds:6.1f} s  {verdict}"


def say(text: object) -> None:
    print(text, flush=True)


class Stage:
    """Starts engines as they are needed, the next fleet's while the present one is checked, and stops the others."""

    def __init__(self, made: dict[str, Vllm], plans: Sequence[Plan]) -> None:
        self._made, self._plans = made, plans
        self._starting: dict[str, asyncio.Task[None]] = {}

    async def enter(self, plan: Plan) -> None:
        where = self._plans.index(plan)
        needed = {name for later in self._plans[where:] for name in later.engines}
        for name in [name for name in self._starting if name not in needed]:
            await self._made[name].stop()
        for name in plan.engines:
            self._start(name)
        await asyncio.gather(*(self._starting[name] for name in plan.engines))
        for following in self._plans[where + 1 : where + 2]:
            for name in following.engines:
                self._start(name)

    def _start(self, name: str) -> None:
        if name not in self._starting:
            self._starting[name] = asyncio.ensure_future(self._made[name].start())

    async def close(self) -> None:
        for task in self._starting.values():
            task.cancel()
        await asyncio.gather(*self._starting.values(), return_exceptions=True)
        await asyncio.gather(*(engine.stop() for engine in self._made.values()))


@asynccontextmanager
async def standing(plan: Plan, made: dict[str, Vllm], model: Path, storage: Path) -> AsyncIterator[Fleet]:
    """The plan's proxy in front of its engines, which serve already, and of our encoder where it has one."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        urls = {name: made[name].url for name in plan.engines}
        if plan.ours:
            options = ["--model", str(model), "--served-model-name", "tiny", "--port", "0", "--dtype", "float32"]
            encoder = Child("encoder", "engines.encoder", [*options, "--threads", "1", *plan.ours])
            stack.push_async_callback(encoder.stop)
            urls["ours"] = await encoder.start()
        lists = [
            "--prefill-servers-urls",
            urls.get(plan.prefill, "disable"),
            "--decode-servers-urls",
            urls[plan.decode],
        ]
        lists += ["--encode-servers-urls", urls[plan.encoder]] if plan.encoder else []
        proxy = Child(f"proxy of {plan.name}", "proxy", ["--port", "0", "--host", "127.0.0.1", *lists])
        stack.push_async_callback(proxy.stop)
        fleet = Fleet(
            proxy=Client(session, await proxy.start()),
            direct=Client(session, urls[plan.decode]),
            encoding=Client(session, urls[plan.encoder or plan.decode]),
            answering=made[plan.decode],
            encoder=made.get(plan.encoder),
            routes=plan.routes,
            storage=storage if plan.in_folder else None,
        )
        await fleet.ready()
        yield fleet


async def row(plan: Plan, name: str, check: Check, fleet: Fleet) -> Row:
    began = time.monotonic()
    failure = ""
    try:
        async with asyncio.timeout(CHECK_TIMEOUT):
            await check(fleet)
    except Exception as error:  # whatever it is, it is this check's result
        failure = f"{type(error).__name__}: {error}"
    result = Row(plan.name, name, failure, time.monotonic() - began)
    say(result)
    return result


async def rows(selected: Sequence[Plan], model: Path, storage: Path) -> list[Row]:
    made = engines(model, storage)
    stage = Stage(made, selected)
    found: list[Row] = []
    try:
        for plan in selected:
            began = time.monotonic()
            try:
                await stage.enter(plan)
                async with standing(plan, made, model, storage) as fleet:
                    say(f"{plan.name:<38} stands after {time.monotonic() - began:.0f} s")
                    found += [await row(plan, name, check, fleet) for name, check in plan.checks.items()]
            except Exception as error:  # the other fleets are checked all the same
                found.append(Row(plan.name, "starts", f"{type(error).__name__}: {error}", time.monotonic() - began))
                say(found[-1])
    finally:
        await stage.close()
    return found


def table(found: Iterable[Row]) -> str:
    """One line per fleet: how many of its checks passed, and which did not."""
    lines = []
    for fleet in dict.fromkeys(row.fleet for row in found):
        mine = [row for row in found if row.fleet == fleet]
        failed = [row.check for row in mine if row.failure]
        lines.append(f"{fleet:<38} {len(mine) - len(failed):>3} of {len(mine):<3} {', '.join(failed) or 'all'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="conformance-vllm", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of names of fleets; default: all")
    parser.add_argument("--family", choices=FAMILIES, default="qwen3_vl", help="of the tiny checkpoint")
    arguments = parser.parse_args()
    began = time.monotonic()
    shutil.rmtree(FOLDER / "logs", ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="triptych-conformance-") as storage:
        every = plans(Path(storage))
        selected = [p for p in every if not arguments.words or any(word in p.name for word in arguments.words)]
        found = asyncio.run(rows(selected, checkpoint(arguments.family), Path(storage)))
    failed = sum(bool(row.failure) for row in found)
    say(f"\n{table(found)}\n")
    minutes = (time.monotonic() - began) / 60
    say(f"{len(found) - failed} of {len(found)} passed in {minutes:.1f} min; logs: {FOLDER}/logs")
    sys.exit(1 if failed or not found else 0)


if __name__ == "__main__":
    main()
