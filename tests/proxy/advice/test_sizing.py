"""What is learnt of real requests, and what follows from it."""

from __future__ import annotations

import asyncio
from itertools import count

import pytest

from proxy.advice import flow
from proxy.advice.flow import Sum
from proxy.advice.sizing import Pacing, Sizing
from proxy.balancer.balance import PRIORS, Balancer
from proxy.balancer.fleet import Event, Fleet
from proxy.core import Role
from tests.fakes.deployment import Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, image, part
from tests.fakes.native import PIECES

E, P, D = Role.ENCODE, Role.PREFILL, Role.DECODE


@pytest.fixture(autouse=True)
def learn_from_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.advice.sizing._EVERY_S", 0.0)


def sums(d: Deployment) -> dict[Sum, float]:
    """As they would be if nothing had faded."""
    found = d.proxy.sizing._flow.sums(d.proxy.sizing._clock())
    whole = 1 / found[Sum.REQUESTS] * round(found[Sum.REQUESTS]) if found[Sum.REQUESTS] else 1.0
    return {what: value * whole for what, value in zip(Sum, found, strict=True)}


async def test_every_stage_of_a_finished_request_is_counted() -> None:
    async with deployment("1e1p1d") as d:
        for shade in range(3):
            media = (part(image(*size, color=(shade, 0, 0))) for size in ((64, 32), (32, 64)))
            assert (await d.post(chat(*media, stream=True, max_tokens=9))).status == 200
        await d.settle()
        found = sums(d)
        near = pytest.approx
        assert found[Sum.REQUESTS] == near(3)
        assert found[Sum.ENCODES] == near(6, rel=0.01)
        assert found[Sum.OUTPUT] == near(3 * (len(PIECES) + 1), rel=0.1), "by the bytes of events"
        assert found[Sum.PROMPT] == near(found[Sum.FIRST_PROMPT]) and found[Sum.PROMPT] > 0
        assert found[Sum.ENCODE_WORK] > 0 and found[Sum.PACES] == found[Sum.BATCH] == near(3, rel=0.01)
        offered = d.proxy.sizing.offered()
        assert offered.encode / offered.requests == near(found[Sum.ENCODE_WORK] / 3)
        assert offered.spread == near(0, abs=1e-6), "all images are alike"
        carried = d.proxy.sizing.carried()
        assert carried.engines == {E: 1, P: 1, D: 1}
        assert carried.encode == near(found[Sum.ENCODE_WORK] / found[Sum.ENCODE_TIME])


async def test_what_an_encoder_holds_is_hardly_offered() -> None:
    async with deployment("1e1b") as d:
        for _ in range(2):
            before = sums(d)[Sum.ENCODE_WORK]
            await d.post(chat(part(image(512, 512))))
            await d.settle()
        assert 0 < sums(d)[Sum.ENCODE_WORK] - before < before / 2


async def test_failed_requests_and_cancelled_ones_are_not() -> None:
    async with deployment("1b") as d:
        d.combined[0].fail(Fault(Kind.STATUS, status=400))
        assert (await d.post(chat())).status == 400
        assert (await d.post(b"{")).status == 400
        d.combined[0].gate = asyncio.Event()
        leaving = asyncio.create_task(d.post(chat()))
        await d.combined[0].until(lambda: d.combined[0].running == 1)
        leaving.cancel()
        await d.settle()
        assert d.proxy.sizing.offered().requests == 0


async def test_where_many_end_at_once_all_are_counted_and_few_are_learnt_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.advice.sizing._EVERY_S", 60.0)
    async with deployment("1p1d") as d:
        for _ in range(5):
            await d.post(chat(stream=True, max_tokens=5))
        await d.settle()
        found = sums(d)
        assert found[Sum.OUTPUT] == pytest.approx(5 * (len(PIECES) + 1), rel=0.1)
        assert found[Sum.PROMPT] == pytest.approx(5 * found[Sum.FIRST_PROMPT], rel=0.01)
        assert found[Sum.PACES] == pytest.approx(1, rel=0.01)


async def test_of_a_combined_engine_streams_tell_the_pace() -> None:
    async with deployment("1b") as d:
        await d.post(chat(max_tokens=5))
        await d.settle()
        assert sums(d)[Sum.OUTPUT] == pytest.approx(len(PIECES), rel=0.01), "as the engine counts"
        assert sums(d)[Sum.PACES] == 0, "in a whole answer its time cannot be told from the prompt's"
        engine = d.combined[0]
        engine.gate = asyncio.Event()
        asking = [asyncio.create_task(d.post(chat(stream=True, max_tokens=5))) for _ in range(3)]
        await engine.until(lambda: engine.running == 3)
        engine.gate.set()
        assert {answer.status for answer in await asyncio.gather(*asking)} == {200}
        await d.settle()
        found = sums(d)
        assert found[Sum.PACES] == pytest.approx(3, rel=0.01)
        assert found[Sum.BATCH] == pytest.approx(1 + 2 + 3, rel=0.01), "as many as were served when each ended"
        assert found[Sum.FIRST_PROMPT] == pytest.approx(found[Sum.PROMPT])
        rate = d.proxy.balancer.rates[P | D].seconds(engine.url)
        assert found[Sum.FIRST_TIME] / found[Sum.FIRST_PROMPT] == pytest.approx(rate, rel=0.5)


def sizing(**engines: int) -> tuple[Sizing, flow.Flow]:
    fleet, numbers = Fleet(), count(1)
    for label, number in engines.items():
        for _ in range(number):
            made = fleet.join(f"http://h:{next(numbers)}", Role.named(label), "native")
            fleet.apply(made, Event.HEALTHY, "healthy")
    shared = flow.alone()
    return Sizing(fleet, Balancer({}), shared, lambda: 1000.0), shared


def test_what_was_not_seen_is_assumed() -> None:
    size, _ = sizing(encode=2, both=1)
    assert size.offered().requests == 0
    carried = size.carried()
    assert carried.engines == {E: 2, P | D: 1}
    assert (carried.encode, carried.prefill) == (1 / PRIORS[E], 1 / PRIORS[P])
    assert carried.decode == pytest.approx(256 / size.pacing().of(256))


@pytest.mark.parametrize("seen", [2, 10_000])
def test_a_pace_is_the_line_through_what_was_seen_once_batches_differed(seen: int) -> None:
    size, shared = sizing(both=1)
    truth = Pacing(0.02, 0.002)
    for number in range(seen):
        batch = 1 + number % 2
        pace = truth.of(batch)
        values = [(Sum.PACES, 1), (Sum.BATCH, batch), (Sum.BATCH_SQUARES, batch**2)]
        shared.add(1000.0, [*values, (Sum.PACE, pace), (Sum.BATCH_PACE, batch * pace), (Sum.KEPT, 100)])
    found = size.pacing()
    assert found.of(1.5) == pytest.approx(truth.of(1.5)), "through the middle of what was seen"
    if seen > 100:
        assert (found.alone, found.crowd) == (pytest.approx(0.02, rel=0.02), pytest.approx(0.002, rel=0.1))
    else:
        assert 0 < found.crowd < 0.001, "two answers are no reason to doubt what is known of engines"


def test_room_for_kv_bounds_the_batch() -> None:
    size, shared = sizing(both=2)
    first, second = size._fleet.ready(P | D)
    first.facts, second.facts = {"kv_tokens": 10_000}, {"kv_tokens": 30_000}
    values = [(Sum.PACES, 1), (Sum.BATCH, 1), (Sum.BATCH_SQUARES, 1), (Sum.PACE, 0.01), (Sum.BATCH_PACE, 0.01)]
    shared.add(1000.0, [*values, (Sum.KEPT, 1000)])
    assert size.carried().decode == pytest.approx(20 / size.pacing().of(20))
