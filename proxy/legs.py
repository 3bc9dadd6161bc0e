"""One leg: its HTTP call, its patience, and the verdict on its instance. Chooses nothing and tries nothing twice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

import orjson

from proxy import openai
from proxy.core import Body, Instance, Job, Leg, Stage
from proxy.dialects.base import BadReply, Dialect
from proxy.errors import Broken, ProxyError, Unreachable, within_200
from proxy.http.message import size
from proxy.lessons import Lessons
from proxy.record import CANCELLED, OK, LegRecord, Record
from proxy.retry import STAGES, cause
from proxy.sse import DONE, Splitter
from proxy.telemetry.metrics import Metrics
from proxy.upstream import Post, Upstream

_ENCODE_ROUTE = "/v1/chat/completions"
_ABORT_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class Suspicion:
    """What to do about an instance that fails; both are told at once and must not wait."""

    dead: Callable[[Instance, str], None]  # nobody listens there
    opened: Callable[[Instance], None]  # its circuit has opened


class Legs:
    """All calls of this proxy's requests to engines."""

    def __init__(
        self,
        dialects: Callable[[Instance], Dialect],
        upstream: Upstream,
        metrics: Metrics,
        clock: Callable[[], float],
        suspicion: Suspicion,
        lessons: Lessons,
    ) -> None:
        self._dialects = dialects
        self._upstream = upstream
        self.metrics = metrics
        self._sent = metrics.bytes.labels("to_engines")
        self._suspicion = suspicion
        self.clock = clock
        self.lessons = lessons
        self.timeouts = upstream.timeouts

    def dialect(self, leg: Leg) -> Dialect:
        return self.speaker(leg.instance)

    def speaker(self, instance: Instance) -> Dialect:
        """The dialect that `instance` is spoken to in."""
        return self._dialects(instance)

    def post(self, leg: Leg, part: LegRecord, body: Body, job: Job, request_id: str, seconds: float | None) -> Post:
        """The call of a judged leg with `body`, see Upstream.post. Raises EngineFailed."""
        data = openai.encoded(body, job)
        self._sent.inc(size(data))
        stage = part.stage
        path = _ENCODE_ROUTE if stage is Stage.ENCODE else job.api
        fields = f"x-request-id: {request_id}\r\n{job.fields}"
        if part.context:
            fields += f"traceparent: {part.context}\r\n"
        return self._upstream.post(leg.instance, stage, path, data, fields, seconds)

    async def call(
        self,
        leg: Leg,
        part: LegRecord,
        body: Body,
        job: Job,
        request_id: str,
        seconds: float,
        ahead: Callable[[Body], None] | None = None,
    ) -> Body:
        """A leg whose answer is a small JSON object for the proxy. Raises EngineFailed.

        `ahead` gets an answer that comes as an event, before what it says is so; this returns when it is.
        """
        async with self.post(leg, part, body, job, request_id, seconds) as answer:
            if ahead is not None and answer.header("content-type").startswith("text/event-stream"):
                return await self._announced(answer, leg, part.stage, ahead)
            return self._object(await answer.read(), leg, part.stage)

    async def _announced(self, answer: Post, leg: Leg, stage: Stage, ahead: Callable[[Body], None]) -> Body:
        splitter, said = Splitter(), None
        while chunk := await answer.chunk():
            for event in splitter.feed(chunk):
                if event.data != DONE:
                    said = self._object(event.data, leg, stage)
                    ahead(said)
                elif said is not None:
                    answer.enough = True
                    return said
        raise Broken(f"the {stage} engine {leg.instance.netloc} broke off what it had announced", stage=stage)

    @staticmethod
    def _object(data: bytes, leg: Leg, stage: Stage) -> Body:
        try:
            parsed = orjson.loads(data)
        except orjson.JSONDecodeError:
            parsed = None
        if not isinstance(parsed, dict):
            raise Broken(f"the {stage} engine {leg.instance.netloc} answered 200 without a JSON object", stage=stage)
        if parsed.get("error"):
            raise within_200(parsed, stage=stage)
        return parsed

    async def abort(self, leg: Leg, stage: Stage, job: Job) -> None:
        """Have the engine end what `job` asked of it, where hanging up does not. Its answer changes nothing."""
        call = self.dialect(leg).abort(job.id)
        if call is None:
            return
        path, body = call
        data = orjson.dumps(body)
        with suppress(ProxyError):
            async with self._upstream.post(leg.instance, stage, path, data, job.fields, _ABORT_TIMEOUT_S) as answer:
                await answer.read()

    def judged(self, leg: Leg, record: Record) -> Judged:
        """Within, the leg runs, as its part of `record` tells: its instance is praised or blamed for the end.
        Cancellation is neither.

        A BadReply becomes Broken here.
        """
        return Judged(self, leg, record)

    def failed(self, leg: Leg, error: ProxyError) -> None:
        self.metrics.failures.labels(error.stage, str(error.code)).inc()
        if error.stage is not STAGES[leg.role]:
            return  # it tells of another engine's failure
        self.metrics.causes.labels(error.stage, cause(error)).inc()
        if isinstance(error, Unreachable):
            self._suspicion.dead(leg.instance, error.message)
        if leg.hold is not None and leg.hold.failed(error, self.clock()):
            self.metrics.openings.labels(leg.instance.role.label, leg.instance.netloc).inc()
            self._suspicion.opened(leg.instance)


class Judged:
    """See Legs.judged."""

    __slots__ = ("_leg", "_legs", "_part", "_record")

    def __init__(self, legs: Legs, leg: Leg, record: Record) -> None:
        self._legs = legs
        self._leg = leg
        self._record = record

    def __enter__(self) -> LegRecord:
        leg, now = self._leg, self._legs.clock()
        part = self._part = self._record.leg(STAGES[leg.role], leg.instance.url, len(leg.items), now, leg.choices)
        return part

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        leg, part = self._leg, self._part
        part.ended = self._legs.clock()
        if error is None:
            part.outcome = OK
            if leg.hold is not None:
                leg.hold.succeeded()
        elif isinstance(error, BadReply):
            broken = Broken(f"{error} ({leg.instance.netloc})", stage=part.stage)
            part.outcome = cause(broken)
            self._legs.failed(leg, broken)
            raise broken from None
        elif isinstance(error, ProxyError):
            part.outcome = cause(error)
            self._legs.failed(leg, error)
        else:
            part.outcome = CANCELLED
