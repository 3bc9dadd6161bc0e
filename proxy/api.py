"""The OpenAI routes and the proxy's own: HTTP in, a job out, every failure as the error contract says."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import orjson
from prometheus_client.exposition import choose_encoder

from proxy.advice.sizing import Sizing
from proxy.auth.guard import Caller, Guard
from proxy.balancer.fleet import Fleet
from proxy.core import Api, Instance, Job, Role
from proxy.dispatch import Dispatcher, Run
from proxy.errors import BadRequest, EngineFailed, NoInstance, NotFound, ProxyError, ShuttingDown
from proxy.http.message import JSON, HttpError, Response, json_response
from proxy.http.router import Audience, Handler, NoRoute, Route, Router, get, post
from proxy.http.server import Request
from proxy.intake.reading import Reading
from proxy.record import Record
from proxy.relay import ClientSink
from proxy.routing import router
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.redaction import redacted
from proxy.telemetry.trace import Trace
from proxy.telemetry.tracing import Tracing
from proxy.upstream import Upstream

log = logging.getLogger(__name__)

request_id: ContextVar[str] = ContextVar("request_id", default="-")

_APIS = {str(api): api for api in Api}
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_FORWARDED = frozenset({"traceparent", "tracestate", "baggage"})
_NOT_FORWARDED = frozenset({"x-request-id", "x-api-key"})
_MODELS_TIMEOUT_S = 5.0
_RETRY_AFTER_S = 1  # probes bring an engine back within seconds
_CLIENT_GONE = 499  # nginx's number for it, in logs and metrics only


class OpenAI:
    def __init__(
        self,
        fleet: Fleet,
        sizing: Sizing,
        dispatcher: Dispatcher,
        upstream: Upstream,
        guard: Guard,
        reading: Reading,
        metrics: Metrics,
        watchers: Sequence[Callable[[Record], None]],
        tracing: Tracing | None,
    ) -> None:
        """`watchers` get the record of each request that has ended."""
        self._fleet = fleet
        self._sizing = sizing
        self.dispatcher = dispatcher
        self._upstream = upstream
        self._metrics = metrics
        self._guard = guard
        self._reading = reading
        self._watchers = watchers
        self._tracing = tracing
        self._active: set[str] = set()  # engine-facing ids in flight
        self.names_engines = True  # to whoever asks /ready
        self.leaving = False  # whoever looks at /ready is to send nothing more

    def routes(self) -> list[Route]:
        return [
            post(Api.CHAT, self.generate),
            post(Api.COMPLETIONS, self.generate),
            get("/v1/models", self.models),
            get("/health", self.health, Audience.ALL),
            get("/ready", self.ready, Audience.ALL),
            *([get("/metrics", self.exposition, Audience.ADMINS)] if self._metrics.counting else []),
        ]

    # ---- generation

    async def generate(self, request: Request) -> Response | None:
        wanted = request_id.get()
        # An id that no other request in flight goes by: engines and callbacks tell requests apart by it.
        engine_id = wanted if wanted not in self._active else f"{wanted}-{secrets.token_hex(4)}"
        self._active.add(engine_id)
        self._metrics.in_flight.inc()
        trace, name = None if self._tracing is None else self._tracing.begin(request.headers), ""
        try:
            with self._guard.admitted(request) as caller:
                name = caller.name
                with _timely(request):
                    job = await self._job(request, engine_id, trace, caller)
                job.record.id, job.record.caller = wanted, name
                return await self._serve(request, job, caller)
        except (ProxyError, HttpError) as error:  # before there was a job
            now, failure = time.monotonic(), _unread(error) if isinstance(error, HttpError) else error
            self._told(Record(wanted, name, request.path, began=now, ended=now, trace=trace), failure)
            return _failed(failure, {})
        finally:
            self._metrics.in_flight.dec()
            self._active.discard(engine_id)

    async def _serve(self, request: Request, job: Job, caller: Caller) -> Response | None:
        sink = ClientSink(request, job.record.id)
        run = self.dispatcher.begin(job, sink)
        caller.takes(job.prompt_tokens)
        try:
            with _timely(request):
                await self.dispatcher.run(run)
            self._ended(run, 200)
            self._sizing.finished(run)
        except ProxyError as error:
            self._ended(run, error.status, error)
            error.settle()
            if not sink.started:
                return _failed(error, run.headers())
            sink.write(error.event())
            sink.end()
        except asyncio.CancelledError:
            self._ended(run, _CLIENT_GONE)
            raise
        finally:
            caller.took(_tokens(job))
        return None

    async def _job(self, request: Request, engine_id: str, trace: Trace | None, caller: Caller) -> Job:
        raw, guard, given = await request.read(), self._guard, request.headers
        headers = _end_to_end(given, guard.forwarded(given, bool(caller.name)))
        if trace is not None:
            trace.supersede(headers)
        job = await self._reading.job(raw, _APIS[request.path], engine_id, guard.identity(given, caller), headers)
        job.record.trace = trace
        caller.names(job.model)
        for item in job.items:
            self._metrics.items.labels(item.modality).inc()
        return job

    def _ended(self, run: Run, status: int, error: ProxyError | None = None) -> None:
        self._told(self.dispatcher.end(run, status), error)

    def _told(self, record: Record, error: ProxyError | None) -> None:
        if error is not None:
            record.status, record.code = error.status, str(error.code)
            record.error = f"{error.stage}: {error.told}"
        for watch in self._watchers:
            watch(record)

    # ---- the proxy's own

    async def models(self, request: Request) -> Response:
        """The models of every engine that can answer a client, each once, as far as its key is for them."""
        caller = self._guard.known(request)
        asked = [i for role in (Role.DECODE, Role.PREFILL | Role.DECODE) for i in self._fleet.ready(role)]
        if not asked:
            raise NoInstance("no decode engine is ready")
        lists = await asyncio.gather(*(self._models_of(instance) for instance in asked))
        found = {model["id"]: model for models in reversed(lists) for model in models}
        if not found:
            raise EngineFailed("no engine told its models")
        shown = [model for name, model in found.items() if caller.may_see(name)]
        return json_response({"object": "list", "data": shown})

    async def _models_of(self, instance: Instance) -> list[dict[str, Any]]:
        try:
            status, answer = await self._upstream.get(instance, "/v1/models", _MODELS_TIMEOUT_S)
            data = orjson.loads(answer)["data"] if status == 200 else []
            return [model for model in data if "id" in model]
        except (EngineFailed, orjson.JSONDecodeError, LookupError, TypeError) as error:
            log.warning("%s does not tell its models: %s", instance.netloc, error)
            return []

    async def health(self, request: Request) -> Response:
        """This process is alive."""
        return json_response({})

    async def ready(self, request: Request) -> Response:
        """Every stage that this fleet has can be served, and the proxy is not about to stop: 200, else 503. Either way
        the instances' states, unless admins alone are to know."""
        ready = router.servable(self._fleet.census()) and not self.leaving
        told: dict[str, Any] = {"ready": ready, "stopping": self.leaving}
        if self.names_engines:
            told["instances"] = [
                {"url": i.url, "role": i.role.label, "state": i.state, "reason": i.reason} for i in self._fleet
            ]
        return json_response(told, status=200 if ready else 503)

    async def exposition(self, request: Request) -> Response:
        """In OpenMetrics or Prometheus' own text, as asked."""
        form, content_type = choose_encoder(request.headers.get("accept", ""))
        await self._metrics.gather()
        return Response(200, self._metrics.render(form), {"content-type": content_type})


class _timely:
    """Within, a request that the server cuts, because it stops, ends with an error that says so."""

    __slots__ = ("_request",)

    def __init__(self, request: Request) -> None:
        self._request = request

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._request.cut and isinstance(error, asyncio.CancelledError):
            raise ShuttingDown("the proxy has stopped before the request's end: send it again") from None


def edge(router: Router) -> Handler:
    """Every route behind one handler: request ids, and the error contract for what fails before an answer has begun."""

    async def handle(request: Request) -> Response | None:
        given = request.headers.get("x-request-id", "")
        request_id.set(given if _ID.fullmatch(given) else f"{random.getrandbits(128):032x}")
        try:
            response = await router.find(request.method, request.path)(request)
        except ProxyError as error:
            log.info(
                "%s %s %s %s: %s", request_id.get(), request.method, redacted(request.path), error.status, error.told
            )
            response = _failed(error, {})
        except HttpError as error:
            response = refused(error)
        except NoRoute as error:
            response = _nowhere(error, request)
        except Exception:
            log.exception("%s failed inside the proxy", request_id.get())
            response = _failed(ProxyError("the proxy failed; its log says why"), {})
        if response is not None and request.started:
            return None  # too late for another answer: what is open is cut
        if response is not None:
            response.headers["x-request-id"] = request_id.get()
        return response

    return handle


def refused(error: HttpError) -> Response:
    """The answer to what could not be read as a request."""
    return _failed(_unread(error), {})


def _unread(error: HttpError) -> BadRequest:
    failure = BadRequest(str(error), code=error.code)
    failure.status = error.status
    return failure


def _nowhere(error: NoRoute, request: Request) -> Response:
    where = f"{request.method} {request.path}"
    if not error.allowed:
        return _failed(NotFound(f"{where}: there is no such path"), {})
    failure = BadRequest(f"{where}: {error}", code="method_not_allowed")
    failure.status = 405
    return _failed(failure, {"allow": ", ".join(sorted(error.allowed))})


def _failed(error: ProxyError, headers: Mapping[str, str]) -> Response:
    named = {"content-type": JSON, **headers}
    if error.retry_after is not None or error.status == 503:
        after = _RETRY_AFTER_S if error.retry_after is None else math.ceil(error.retry_after)
        named["retry-after"] = str(after)
    if error.status == 401:
        named["www-authenticate"] = "Bearer"
    return Response(error.status, error.json(), named)


def _tokens(job: Job) -> int:
    """What a request that has ended took of engines. Where nobody could tell how long its answer was: as predicted."""
    record = job.record
    if not record.legs:
        return 0
    return record.prompt_tokens + (record.output_tokens or (job.output_tokens if record.first else 0))


def _end_to_end(headers: Mapping[str, str], credentials: bool) -> dict[str, str]:
    """What engines get to see of a client's headers: tracing, extensions, and `credentials` if they are for them."""
    return {
        name: value
        for name, value in headers.items()
        if name in _FORWARDED
        or (name.startswith("x-") and name not in _NOT_FORWARDED)
        or (credentials and name == "authorization")
    }
