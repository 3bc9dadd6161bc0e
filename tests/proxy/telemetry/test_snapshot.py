"""What the page is told, after real requests: each thing by its owner, alike by every worker, once for all viewers."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import orjson

from proxy.admin import Admin
from proxy.record import Record
from proxy.telemetry.history import SPAN_S, SPANS, WINDOW
from proxy.telemetry.snapshot import Owners, Snapshots
from tests.fakes.deployment import Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, image, part
from tests.fakes.native import Language
from tests.support.crowd import crowd
from tests.support.waiting import eventually


class Watch:
    """Looks at a proxy from a moment of its own."""

    def __init__(self, d: Deployment) -> None:
        proxy = d.proxy
        admin = Admin(proxy.fleet, proxy.membership, proxy.balancer, proxy.health, proxy.switching, proxy.guard, "auto")
        owners = Owners(proxy.fleet, admin, proxy.metrics, proxy.advising, proxy.history, proxy.receipts, 1)
        self.snapshots = Snapshots(owners, lambda: self.now)
        self.now = time.monotonic()

    async def look(self, since: int | None = None) -> dict[str, Any]:
        found: dict[str, Any] = orjson.loads(await self.snapshots.get(since))
        return found


async def test_it_tells_of_fleet_requests_and_plan() -> None:
    async with deployment("1e1p1d") as d:
        await d.post(chat(part(image()), part(image(9, 9)), stream=True))
        d.prefills[0].fail(Fault(Kind.STATUS, status=400))
        await d.post(chat())
        await d.settle()
        watch = Watch(d)
        watch.now += SPAN_S
        found = await watch.look()
        assert found["version"].startswith("0.") and found["workers"] == 1 and found["ready"] is True
        assert (found["in_flight"], found["queued"]) == (0, 0)
        assert [(i["role"], i["state"], i["leases"]) for i in found["instances"]] == [
            *(("encode", "READY", 0), ("prefill", "READY", 0), ("decode", "READY", 0))
        ]
        assert all(i["circuit"] == "CLOSED" and i["url"].startswith("http://") for i in found["instances"])
        assert found["plan"]["offered"]["requests"] > 0 and found["plan"]["roles"]
        columns = found["curves"]["columns"]
        told = {name: round(values[-1] * SPAN_S * WINDOW) for name, values in columns.items() if values[-1] is not None}
        assert (told["served"], told["refused"], told["failed"], told["items"]) == (1, 1, 0, 2)
        assert (told["E-P-D"], told["P-D"]) == (1, 1)
        assert [(r["path"], r["status"]) for r in found["requests"]] == [("P-D", 400), ("E-P-D", 200)]
        assert {leg["stage"] for leg in found["requests"][1]["legs"]} == {"encode", "prefill", "decode"}
        assert columns["ttft_p50"][-1] > 0 and columns["ttft_p50"][0] is None
        assert {len(values) for values in columns.values()} == {SPANS - WINDOW}


async def test_a_stage_without_instances_is_told() -> None:
    async with deployment("1e1p1d") as d:
        d.proxy.fleet.remove(d.decodes[0].url)
        assert (await Watch(d).look())["ready"] is False


async def test_who_has_the_earlier_points_and_requests_gets_the_later_ones() -> None:
    async with deployment("1b") as d:
        watch = Watch(d)
        for long_ago in (3600.0, 0.0):
            d.proxy.receipts.ended(Record(id=str(long_ago), began=watch.now - long_ago, ended=watch.now - long_ago))
        whole = await watch.look()
        assert [one["id"] for one in whole["requests"]] == ["0.0", "3600.0"]
        last = whole["curves"]["last"]
        watch.now += 2 * SPAN_S
        recent = await watch.look(last)
        assert recent["curves"]["last"] == last + 2
        assert 2 <= len(recent["curves"]["columns"]["served"]) < 30 < len(whole["curves"]["columns"]["served"])
        assert recent.keys() == whole.keys() and [one["id"] for one in recent["requests"]] == ["0.0"]
        assert (await watch.look(last - SPANS)).keys() == whole.keys()
        for other in (last - SPANS, last + 3):  # too old; of another boot
            assert len((await watch.look(other))["curves"]["columns"]["served"]) == SPANS - WINDOW


async def test_however_many_watch_it_is_made_once_a_second() -> None:
    async with deployment("1b") as d:
        watch = Watch(d)
        one, *others = await asyncio.gather(*(watch.snapshots.get() for _ in range(20)))
        assert all(other is one for other in others)
        watch.now += 0.9
        assert await watch.snapshots.get() is one
        watch.now += 0.2
        assert await watch.snapshots.get() is not one


async def test_any_worker_tells_of_all(tmp_path: Path) -> None:
    async with Language() as engine, crowd(tmp_path, 3, "--decode-servers-urls", engine.url) as proxy:
        gate = engine.gate = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(6):
                group.create_task(proxy.chat(chat(stream=False)))
            await engine.until(lambda: engine.running == 6)

            async def alike() -> bool:
                return all([(await proxy.get("/ui/state"))["in_flight"] == 6 for _ in range(9)])

            await eventually(alike)
            gate.set()

        async def told() -> bool:
            curves = [(await proxy.get("/ui/state"))["curves"] for _ in range(9)]
            return all(round(max(c["columns"]["served"]) * SPAN_S * WINDOW) == 6 for c in curves)

        await eventually(told)


async def test_who_leaves_while_it_is_made_leaves_the_next_a_whole_one() -> None:
    async with deployment("1b") as d:
        watch = Watch(d)
        first = asyncio.create_task(watch.look())
        await asyncio.sleep(0)  # it waits for the plan, which is made in a thread
        first.cancel()
        await asyncio.wait([first])
        assert first.cancelled()
        found = await watch.look()
        assert len(found["instances"]) == 1 and found["plan"]
