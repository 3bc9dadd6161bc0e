"""One leg: its HTTP call, its patience, and the verdict on its instance. Chooses nothing and tries nothing twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import dataclass

import orjson

from proxy import openai
from proxy.core import Body, Instance, Job, Leg, Stage
from proxy.dialects.base import BadReply, Dialect
from proxy.errors import Broken, ProxyError, Unreachable, within_200
from proxy.http.message import size
from proxy.metrics import Metrics
from proxy.retry import STAGES, cause
from proxy.upstream import Answer, Upstream, deadline

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
    ) -> None:
        self._dialects = dialects
        self._upstream = upstream
        self.metrics = metrics
        self._sent = metrics.bytes.labels("to_engines")
        self._suspicion = suspicion
        self.clock = clock
        self.timeouts = upstream.timeouts

    def dialect(self, leg: Leg) -> Dialect:
        return self.speaker(leg.instance)

    def speaker(self, instance: Instance) -> Dialect:
        """The dialect that `instance` is spoken to in."""
        return self._dialects(instance)

    def post(
        self, leg: Leg, stage: Stage, body: Body, job: Job, request_id: str
    ) -> AbstractAsyncContextManager[Answer]:
        """Send `body`; yields once the engine has answered with status 200. Raises EngineFailed."""
        data = openai.encoded(body, job)
        self._sent.inc(size(data))
        path = _ENCODE_ROUTE if stage is Stage.ENCODE else job.api
        headers = {**job.headers, "x-request-id": request_id}
        return self._upstream.post(leg.instance, stage, path, data, headers)

    async def call(self, leg: Leg, stage: Stage, body: Body, job: Job, request_id: str) -> Body:
        """A leg whose answer is a small JSON object for the proxy. Raises EngineFailed."""
        async with self.post(leg, stage, body, job, request_id) as answer:
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

    async def abort(self, leg: Leg, stage: Stage, job: Job) -> None:
        """Have the engine end what `job` asked of it, where hanging up does not. Its answer changes nothing."""
        call = self.dialect(leg).abort(job.id)
        if call is None:
            return
        path, body = call
        post = self._upstream.post(leg.instance, stage, path, orjson.dumps(body), job.headers)
        with suppress(ProxyError):
            async with deadline(_ABORT_TIMEOUT_S, stage, leg.instance), post as answer:
                await answer.read()

    @contextmanager
    def judged(self, leg: Leg) -> Iterator[None]:
        """Within, the leg runs: its instance is praised or blamed for the end. Cancellation is neither.

        A BadReply becomes Broken here.
        """
        try:
            yield
        except BadReply as error:
            broken = Broken(f"{error} ({leg.instance.netloc})", stage=STAGES[leg.role])
            self._failed(leg, broken)
            raise broken from None
        except ProxyError as error:
            self._failed(leg, error)
            raise
        if leg.hold is not None:
            leg.hold.succeeded()

    def _failed(self, leg: Leg, error: ProxyError) -> None:
        self.metrics.failures.labels(error.stage, str(error.code)).inc()
        if error.stage is not STAGES[leg.role]:
            return  # it tells of another engine's failure
        self.metrics.causes.labels(error.stage, cause(error)).inc()
        if isinstance(error, Unreachable):
            self._suspicion.dead(leg.instance, error.message)
        if leg.hold is not None and leg.hold.failed(error, self.clock()):
            self.metrics.openings.labels(leg.instance.role.label, leg.instance.netloc).inc()
            self._suspicion.opened(leg.instance)
