"""What is exposed after real requests, by name."""

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.deployment import Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, image, part
from tests.support.waiting import until


async def samples(d: Deployment) -> dict[tuple[str, ...], float]:
    text = (await d.get("/metrics")).body.decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_every_stage_has_a_histogram_and_leases_return_to_zero() -> None:
    async with deployment("1e1p1d") as d:
        await d.post(chat(part(image()), stream=True))
        d.decodes[0].fail(Fault(Kind.STATUS, status=503))
        await d.post(chat())
        await d.post(b"{")
        await d.settle()
        found = await samples(d)
        for stage in ("encode", "prefill", "decode", "ttft"):
            assert found[f"triptych_{stage}_seconds_count",] == 1
        assert found["triptych_e2e_seconds_count",] == 2
        assert found["triptych_requests_total", "E-P-D", "200"] == 1
        assert found["triptych_requests_total", "P-D", "503"] == 1
        assert found["triptych_requests_total", "none", "400"] == 1
        assert found["triptych_failures_total", "503", "decode"] == 1
        assert found["triptych_items_total", "image"] == 1
        assert all(found["triptych_leases", role] == 0 for role in ("encode", "prefill", "decode", "both"))
        assert found["triptych_instances", "decode", "READY"] == 1
        assert found["triptych_load_tokens", d.decodes[0].netloc, "decode"] == 0
        assert found["triptych_requests_in_flight",] == 0
        assert all(found["triptych_bytes_total", way] > 0 for way in ("from_clients", "to_engines", "to_clients"))


async def test_requests_of_this_moment_are_told() -> None:
    async with deployment("1b", max_concurrent=1) as d:
        gate = d.combined[0].gate = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(d.post(chat()))
            await until(lambda: d.proxy.metrics.requests_now() == (3, 2))
            gate.set()
        assert d.proxy.metrics.requests_now() == (0, 0)


async def test_every_name_begins_with_triptych() -> None:
    async with deployment("1b") as d:
        assert all(name.startswith("triptych_") for name, *_ in await samples(d))
