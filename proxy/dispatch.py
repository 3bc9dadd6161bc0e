"""Runs a plan: when each leg is sent, what cancels what, what the client gets. Chooses no path and no instance.

Both orders are coded once, here; dialects shape the bodies. Every leg runs inside the request's own task, so that one
cancellation (the client left, a sibling failed, shutdown) ends all of them, and the leases are returned on the way out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from proxy import relay
from proxy.callbacks import Metaserver, Waiting
from proxy.core import BOTH, Body, Handle, Item, Job, Leg, Order, Plan, Role, Stage
from proxy.dialects.base import BadReply, Dialect
from proxy.errors import Broken, ProxyError, Refused, within_200
from proxy.metrics import Metrics
from proxy.plan import Planner
from proxy.relay import Sink
from proxy.tasks import together
from proxy.upstream import Upstream, deadline

log = logging.getLogger(__name__)

Handles = dict[int, Handle]

# The prefill engine fetched an embedding that its encoder no longer holds: encoding again brings it back.
_EMBEDDING_GONE = "embedding_gone"
_ATTEMPTS = 2


@dataclass(slots=True)
class Run:
    """What is known of a request on its way, for its headers, its log line and its metrics."""

    job: Job
    sink: Sink
    began: float
    plan: Plan | None = None
    attempts: int = 0
    timings: dict[str, float] = field(default_factory=dict)  # seconds by stage
    timer: asyncio.Timeout | None = None  # of the leg that answers
    decode_began: float = 0.0

    def headers(self) -> dict[str, str]:
        """The route receipt and the durations known by now."""
        found = {} if self.plan is None else {"x-triptych-route": str(self.plan)}
        if self.timings:
            found["Server-Timing"] = ", ".join(f"{name};dur={s * 1000:.1f}" for name, s in self.timings.items())
        return found


class Dispatcher:
    """One for the whole proxy; all that belongs to one request is in its Run."""

    def __init__(
        self,
        planner: Planner,
        dialects: Mapping[str, Dialect],
        upstream: Upstream,
        metaserver: Metaserver,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._planner = planner
        self._dialects = dialects
        self._upstream = upstream
        self._metaserver = metaserver
        self._timeouts = upstream.timeouts
        self._metrics = metrics
        self._clock = clock

    def begin(self, job: Job, sink: Sink) -> Run:
        return Run(job, sink, self._clock())

    def elapsed(self, run: Run) -> float:
        """Seconds since `run` began."""
        return self._clock() - run.began

    async def run(self, run: Run) -> None:
        """Serve the request to its end. Raises ProxyError (with attempts counted), relay.ClientGone.

        Once `run.sink.started` is true, an error can only be told as the stream's last event.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            run.attempts = attempt
            try:
                with ExitStack() as leases:
                    run.plan = self._planner.draw(run.job, leases)
                    await self._once(run, run.plan, _renamed(run.job, attempt))
                    return
            except ProxyError as error:
                error.attempts = attempt
                self._metrics.failures.labels(error.stage, str(error.code)).inc()
                if error.code != _EMBEDDING_GONE or run.sink.started or attempt == _ATTEMPTS:
                    raise
                log.info("%s encodes again: %s", run.job.id, error)

    async def _once(self, run: Run, plan: Plan, job: Job) -> None:
        handles = await self._encode(run, plan, job)
        if BOTH in plan.path.roles:
            leg = plan.leg(BOTH)
            await self._answer(run, leg, self._dialect(leg).whole(job, handles), job)
        elif self._dialect(plan.leg(Role.DECODE)).order is Order.SEQUENTIAL:
            await self._sequential(run, plan, job, handles)
        else:
            await self._decode_first(run, plan, job, handles)

    # ---- encode: all encoders of the request at once; the first failure cancels the others

    async def _encode(self, run: Run, plan: Plan, job: Job) -> Handles:
        if not plan.encodes:
            return {}
        began = self._clock()
        async with together() as group:
            tasks = [group.create_task(self._encode_leg(leg, job)) for leg in plan.encodes]
        self._timed(run, "encode", began)
        found = {index: handle for task in tasks for index, handle in task.result().items()}
        by_identity = {item.identity: found[item.index] for leg in plan.encodes for item in leg.items}
        return {item.index: by_identity[item.identity] for item in job.items}

    async def _encode_leg(self, leg: Leg, job: Job) -> Handles:
        dialect = self._dialect(leg)
        try:
            async with deadline(self._timeouts.encode, Stage.ENCODE, leg.instance):
                reply = await self._call(
                    leg, Stage.ENCODE, dialect.encode(job, leg.items), job, _child_id(job, leg.items)
                )
            return dialect.read_encode(leg.items, reply)
        except Refused as error:
            error.param = dialect.blame(leg.items, error.param)
            raise
        except BadReply as error:
            raise Broken(f"{error} ({leg.instance.netloc})", stage=Stage.ENCODE) from None

    # ---- the two orders of prefill and decode

    async def _sequential(self, run: Run, plan: Plan, job: Job, handles: Handles) -> None:
        prefill, decode = plan.leg(Role.PREFILL), plan.leg(Role.DECODE)
        reply = await self._prefill(run, prefill, job, handles, None)
        try:
            handoff = self._dialect(prefill).read_prefill(reply)
        except BadReply as error:
            raise Broken(f"{error} ({prefill.instance.netloc})", stage=Stage.PREFILL) from None
        await self._answer(run, decode, self._dialect(decode).decode(job, handles, handoff, ""), job)

    async def _decode_first(self, run: Run, plan: Plan, job: Job, handles: Handles) -> None:
        prefill, decode = plan.leg(Role.PREFILL), plan.leg(Role.DECODE)
        url = await self._metaserver.url_for(decode.instance)
        body = self._dialect(decode).decode(job, handles, None, url)
        with self._metaserver.expect(job.id) as waiting:
            async with together() as group:
                task = group.create_task(self._prefill_on_call(run, waiting, prefill, job, handles))
                await self._answer(run, decode, body, job)
                if not waiting.asked:
                    task.cancel()  # the decode engine had no need of it

    async def _prefill_on_call(self, run: Run, waiting: Waiting, leg: Leg, job: Job, handles: Handles) -> None:
        descriptor = await waiting.descriptor()
        self._patience(run, None)  # the prefill has a deadline of its own
        try:
            await self._prefill(run, leg, job, handles, descriptor)
        except ProxyError as error:
            waiting.finish(error)
            if not run.sink.started:
                raise
            log.warning("%s: prefill failed after decode had begun to answer: %s", job.id, error)
        waiting.finish(None)
        if not run.sink.started:
            run.decode_began = self._clock()
        self._patience(run, self._first_answer(job))

    async def _prefill(
        self, run: Run, leg: Leg, job: Job, handles: Handles, descriptor: Mapping[str, Any] | None
    ) -> Body:
        began = self._clock()
        async with deadline(self._timeouts.prefill, Stage.PREFILL, leg.instance):
            reply = await self._call(
                leg, Stage.PREFILL, self._dialect(leg).prefill(job, handles, descriptor), job, job.id
            )
        self._timed(run, "prefill", began)
        return reply

    # ---- the leg whose answer is the client's

    async def _answer(self, run: Run, leg: Leg, body: Body, job: Job) -> None:
        def head() -> Mapping[str, str]:
            self._timed(run, "ttft", run.began)
            return run.headers()

        data = orjson.dumps(body)
        self._metrics.bytes.labels("to_engines").inc(len(data))
        run.decode_began = self._clock()
        async with (
            deadline(self._first_answer(job), Stage.DECODE, leg.instance) as run.timer,
            self._upstream.post(leg.instance, Stage.DECODE, job.api, data, _headers(job, job.id)) as answer,
        ):
            if job.stream:
                idle = self._timeouts.stream_idle
                await relay.stream(answer, run.sink, head, Stage.DECODE, run.timer, idle)
            else:
                await relay.whole(answer, run.sink, head, Stage.DECODE, run.timer)
        self._timed(run, "decode", run.decode_began)

    def _first_answer(self, job: Job) -> float:
        return self._timeouts.first_token if job.stream else self._timeouts.answer

    def _patience(self, run: Run, seconds: float | None) -> None:
        """How long the answering leg may take from now to its first byte; nothing changes once that is there."""
        if run.timer is not None and not run.sink.started and not run.timer.expired():
            run.timer.reschedule(None if seconds is None else asyncio.get_running_loop().time() + seconds)

    # ---- shared by the legs

    async def _call(self, leg: Leg, stage: Stage, body: Body, job: Job, request_id: str) -> Body:
        """A leg whose answer is a small JSON object for the proxy. Raises EngineFailed."""
        data = orjson.dumps(body)
        self._metrics.bytes.labels("to_engines").inc(len(data))
        path = job.api if stage is not Stage.ENCODE else "/v1/chat/completions"
        async with self._upstream.post(leg.instance, stage, path, data, _headers(job, request_id)) as answer:
            reply = await answer.read()
        try:
            parsed = orjson.loads(reply)
        except orjson.JSONDecodeError:
            parsed = None
        if not isinstance(parsed, dict):
            raise Broken(f"the {stage} engine {leg.instance.netloc} answered 200 without a JSON object", stage=stage)
        if parsed.get("error"):
            raise within_200(parsed, stage=stage)
        return parsed

    def _dialect(self, leg: Leg) -> Dialect:
        return self._dialects[leg.instance.dialect]

    def _timed(self, run: Run, stage: str, began: float) -> None:
        run.timings[stage] = self._clock() - began
        self._metrics.observe(stage, run.timings[stage])


def _renamed(job: Job, attempt: int) -> Job:
    """An engine that still holds the first attempt must not take the second one for it."""
    return job if attempt == 1 else replace(job, id=f"{job.id}-{attempt}")


def _child_id(job: Job, items: tuple[Item, ...]) -> str:
    return f"{job.id}:{items[0].index}"


def _headers(job: Job, request_id: str) -> dict[str, str]:
    return {**job.headers, "x-request-id": request_id}
