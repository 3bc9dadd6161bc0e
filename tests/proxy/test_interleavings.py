"""Random lives of a proxy: arrivals, failures, cancellations, engines that go and come, in any order.

Whatever happens, loads are the sums of open leases at every step, every request ends with one answer, and in the end
nothing is held anywhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy import openai
from proxy.balancer.fleet import Event, Fleet
from proxy.breaker import Breakers, Thresholds
from proxy.callbacks import Metaserver
from proxy.core import BOTH, Api, Instance, Job, Order, Role, State
from proxy.dialects.base import Dialect, Media, Options
from proxy.dialects.native import Native
from proxy.dialects.vllm import Vllm
from proxy.dispatch import Dispatcher, Rules
from proxy.encoding import Encoding
from proxy.errors import ProxyError
from proxy.hedge import Hedge
from proxy.intake.admission import Admission, Limits, Outlook
from proxy.intake.gate import Gate, Targets
from proxy.legs import Legs, Suspicion
from proxy.lessons import Lessons
from proxy.media.costs import Costs
from proxy.openai import Identity
from proxy.planning.plan import Planner
from proxy.telemetry.metrics import Metrics
from tests.fakes.media import chat, image, part
from tests.fakes.wire import ENDINGS, Wire
from tests.support.balancing import balancer

IMAGES = [part(image(8 + 4 * number, 8)) for number in range(3)]


@dataclass
class Client:
    """What one client got."""

    started: bool = False
    got: bytes = b""
    ended: bool = False
    error: ProxyError | None = None
    paused: bool = False
    sent: int = 0

    def begin(self, content_type: str, headers: Any, length: int | None, data: bytes) -> None:
        assert not self.started
        self.started, self.got = True, data

    def write(self, data: bytes) -> None:
        assert self.started and not self.ended
        self.got += data

    def end(self) -> None:
        assert self.started and not self.ended
        self.ended = True

    def chunk_writer(self) -> None:
        return None

    def throttle(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        """It takes everything at once."""


@dataclass
class World:
    """A proxy without HTTP: the dispatcher and all it decides with, over scripted calls and a clock of its own."""

    order: Order
    now: float = 0.0
    clients: list[tuple[Client, asyncio.Task[None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fleet = Fleet()
        for role, count in ((Role.ENCODE, 2), (Role.PREFILL, 2), (Role.DECODE, 2), (BOTH, 1)):
            for number in range(count):
                self.up(self.fleet.join(f"http://{role.label}{number}", role, "native"))
        self.balancer = balancer()
        self.breakers = Breakers(Thresholds(2, 5.0))
        self.metrics = Metrics()
        admission = Admission(Limits(4, 1 << 20, 3, 60.0))
        self.gate = Gate(admission, self.metrics, lambda: self.now, self.foresee, Targets())
        self.metaserver = Metaserver("127.0.0.1")
        self.wire = Wire(self.metaserver)
        suspicion = Suspicion(dead=lambda instance, reason: self.down(instance), opened=lambda instance: None)
        upstream: Any = self.wire
        legs = Legs(self.dialect, upstream, self.metrics, lambda: self.now, suspicion, Lessons(self.balancer, Costs()))
        planner = Planner(self.fleet, self.balancer, self.breakers, inline=True)
        encoding = Encoding(legs, planner, Hedge(""), 3)
        self.dispatcher = Dispatcher(planner, legs, encoding, self.metaserver, self.gate, Rules(resume=True))

    def foresee(self, job: Job) -> Outlook:
        raise AssertionError("nobody has a target")

    def dialect(self, instance: Instance) -> Dialect:
        if self.order is not Order.TOGETHER:
            return Native(self.order)
        told = replace(instance, facts={"bootstrap": "http://p:8998", "engine_ids": {"0": "e"}})
        return Vllm(Options(self.order, Media.NEVER), told)

    def up(self, instance: Instance) -> None:
        if instance.state is not State.READY:
            self.fleet.apply(instance, Event.HEALTHY, "")

    def down(self, instance: Instance) -> None:
        if instance.state is State.READY:
            self.fleet.apply(instance, Event.FAILED, "")

    def arrive(self, number: int, items: int) -> None:
        fields = {"stream": bool(number % 2), "temperature": number % 3, "priority": number % 4}
        body = orjson.dumps(chat(*IMAGES[: items % 4], **fields))
        job = openai.parse(body, Api.CHAT, f"r{number}", Identity())
        client = Client()
        self.clients.append((client, asyncio.create_task(self.serve(job, client))))

    async def serve(self, job: openai.Job, client: Client) -> None:
        try:
            await self.dispatcher.run(self.dispatcher.begin(job, client))
        except ProxyError as error:
            client.error = error

    def act(self, what: str, one: int, two: int) -> None:
        if what == "arrive":
            self.arrive(len(self.clients), one)
        elif what == "answer" and self.wire.calls:
            call = self.wire.calls[one % len(self.wire.calls)]
            if not call.ending.done():
                call.ending.set_result(ENDINGS[two % len(ENDINGS)] if two < 20 else "ok")
        elif what == "cancel" and self.clients:
            self.clients[one % len(self.clients)][1].cancel()
        elif what == "engine":
            instance = list(self.fleet)[one % len(list(self.fleet))]
            (self.down if two % 2 else self.up)(instance)
        elif what == "wait":
            self.now += one

    async def rest(self) -> None:
        """Until nothing moves without another event."""
        for _ in range(30):
            await asyncio.sleep(0)
        self.check()

    def check(self) -> None:
        self.balancer.ledger.check()
        running = [task for _, task in self.clients if not task.done()]
        admission = self.gate.admission
        assert admission.requests + admission.waiting <= len(running)
        if not running:
            assert not self.held()

    def held(self) -> list[Any]:
        admission = self.gate.admission
        held = [self.balancer.ledger.leases(), len(self.metaserver), len(self.wire.calls)]
        held += [admission.requests, admission.nbytes, admission.waiting]
        held += [record.trial for record in self.breakers._records.values()]
        return [one for one in held if one]

    async def finish(self) -> None:
        async with asyncio.timeout(20):
            while any(not task.done() for _, task in self.clients):
                for call in list(self.wire.calls):
                    if not call.ending.done():
                        call.ending.set_result("ok")
                await asyncio.sleep(0)
        for client, task in self.clients:
            if not task.cancelled():
                task.result()
                self.judge(client)
        await self.rest()
        assert not self.held()

    def judge(self, client: Client) -> None:
        """One answer and the right one: whole, or an error, or a beginning and then an error."""
        if client.error is None:
            assert client.ended
            assert client.got.count(b'"content":"x"') == 1 and (b"data:" not in client.got or b"[DONE]" in client.got)
        else:
            assert not client.ended and b"[DONE]" not in client.got
            assert client.error.attempts <= 3


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "arrive", "answer", "answer", "answer", "answer", "cancel", "engine", "wait"]),
        st.integers(0, 20),
        st.integers(0, 60),
    ),
    min_size=20,
    max_size=80,
)


@pytest.mark.parametrize("order", Order)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_nothing_is_ever_held_for_nobody(order: Order, steps: list[tuple[str, int, int]]) -> None:
    async def live() -> None:
        world = World(order)
        try:
            for step in steps:
                world.act(*step)
                await world.rest()
            await world.finish()
        finally:
            for _, task in world.clients:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*(task for _, task in world.clients), return_exceptions=True)

    asyncio.run(live())
