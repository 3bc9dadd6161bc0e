"""The OpenAI routes and the proxy's own: HTTP in, a job out, every failure as the error contract says."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import orjson
from aiohttp import web

from proxy import openai
from proxy.balancer.balance import Balancer
from proxy.balancer.fleet import Fleet
from proxy.core import Api, Instance, Job, Role
from proxy.dispatch import Dispatcher, Run
from proxy.errors import BadRequest, EngineFailed, NoInstance, NotFound, ProxyError, TooLarge
from proxy.metrics import Metrics
from proxy.openai import Identity
from proxy.relay import ClientGone, ClientSink
from proxy.routing import router
from proxy.upstream import Upstream

log = logging.getLogger(__name__)

request_id: ContextVar[str] = ContextVar("request_id", default="-")

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_FORWARDED = frozenset({"authorization", "traceparent", "tracestate", "baggage"})
_NOT_FORWARDED = frozenset({"x-request-id", "x-api-key"})
_LARGE = 1 << 18  # bytes; parsing and hashing more than this takes a millisecond and leaves the loop
_MODELS_TIMEOUT_S = 5.0
_RETRY_AFTER_S = 1  # probes bring an engine back within seconds
_CLIENT_GONE = "499"  # nginx's number for it, in logs and metrics only

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class OpenAI:
    def __init__(
        self,
        fleet: Fleet,
        balancer: Balancer,
        dispatcher: Dispatcher,
        upstream: Upstream,
        metrics: Metrics,
        identity: Callable[[Mapping[str, str]], Identity],
    ) -> None:
        self._fleet = fleet
        self._balancer = balancer
        self._dispatcher = dispatcher
        self._upstream = upstream
        self._metrics = metrics
        self._identity = identity
        self._active: set[str] = set()  # engine-facing ids in flight

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post(Api.CHAT, self.generate),
            web.post(Api.COMPLETIONS, self.generate),
            web.get("/v1/models", self.models),
            web.get("/health", self.health),
            web.get("/ready", self.ready),
            web.get("/metrics", self.exposition),
        ]

    # ---- generation

    async def generate(self, request: web.Request) -> web.StreamResponse:
        sink = ClientSink(request, {"x-request-id": request_id.get()})
        with self._claimed(request_id.get()) as engine_id, self._metrics.in_flight.track_inprogress():
            job = await self._job(request, engine_id)
            run = self._dispatcher.begin(job, sink)
            try:
                await self._dispatcher.run(run)
                self._ended(run, "200")
            except ProxyError as error:
                self._ended(run, str(error.status), error)
                if not sink.started:
                    return _failed(error, run.headers())
                await sink.write(error.event())
                await sink.end()
            except (asyncio.CancelledError, ClientGone):
                self._ended(run, _CLIENT_GONE)
                raise
        return sink.response

    async def _job(self, request: web.Request, engine_id: str) -> Job:
        raw = await request.read()
        self._metrics.bytes.labels("from_clients").inc(len(raw))
        api, headers = Api(request.path), _end_to_end(request.headers)
        arguments = (raw, api, engine_id, self._identity(request.headers), headers)
        try:
            job = await asyncio.to_thread(openai.parse, *arguments) if len(raw) > _LARGE else openai.parse(*arguments)
        except ProxyError as error:
            self._metrics.requests.labels("none", str(error.status)).inc()
            raise
        for item in job.items:
            self._metrics.items.labels(item.modality).inc()
        return job

    @contextmanager
    def _claimed(self, wanted: str) -> Iterator[str]:
        """An id that no other request in flight goes by: engines and callbacks tell requests apart by it."""
        engine_id = wanted if wanted not in self._active else f"{wanted}-{secrets.token_hex(4)}"
        self._active.add(engine_id)
        try:
            yield engine_id
        finally:
            self._active.discard(engine_id)

    def _ended(self, run: Run, status: str, error: ProxyError | None = None) -> None:
        path = run.plan.path.label if run.plan is not None else "none"
        seconds = self._dispatcher.elapsed(run)
        self._metrics.requests.labels(path, status).inc()
        self._metrics.observe("e2e", seconds)
        self._metrics.bytes.labels("to_clients").inc(getattr(run.sink, "sent", 0))
        timings = " ".join(f"{name}={s * 1000:.0f}ms" for name, s in run.timings.items())
        log.info(
            "%s %s %s e2e=%.0fms %s route=%r%s",
            *(run.job.id, run.job.api, status, seconds * 1000, timings, str(run.plan or "")),
            f" error={error.stage}: {error}" if error else "",
        )

    # ---- the proxy's own

    async def models(self, request: web.Request) -> web.Response:
        """The models of every engine that can answer a client, each once."""
        asked = [i for role in (Role.DECODE, Role.PREFILL | Role.DECODE) for i in self._fleet.ready(role)]
        if not asked:
            raise NoInstance("no decode engine is ready")
        lists = await asyncio.gather(*(self._models_of(instance) for instance in asked))
        found = {model["id"]: model for models in reversed(lists) for model in models}
        if not found:
            raise EngineFailed("no engine told its models")
        return web.json_response({"object": "list", "data": list(found.values())})

    async def _models_of(self, instance: Instance) -> list[dict[str, Any]]:
        try:
            status, answer = await self._upstream.get(instance, "/v1/models", _MODELS_TIMEOUT_S)
            data = orjson.loads(answer)["data"] if status == 200 else []
            return [model for model in data if "id" in model]
        except (EngineFailed, orjson.JSONDecodeError, LookupError, TypeError) as error:
            log.warning("%s does not tell its models: %s", instance.netloc, error)
            return []

    async def health(self, request: web.Request) -> web.Response:
        """This process is alive."""
        return web.json_response({})

    async def ready(self, request: web.Request) -> web.Response:
        """Every stage that this fleet has can be served: 200, else 503; the instances' states either way."""
        census = self._fleet.census()
        ready = router.servable(census)
        states = [{"url": i.url, "role": i.role.label, "state": i.state, "reason": i.reason} for i in self._fleet]
        return web.json_response({"ready": ready, "instances": states}, status=200 if ready else 503)

    async def exposition(self, request: web.Request) -> web.Response:
        text = self._metrics.render(self._fleet, self._balancer.ledger)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Request ids, and the error contract for everything that fails before an answer has begun."""
    given = request.headers.get("x-request-id", "")
    request_id.set(given if _ID.fullmatch(given) else secrets.token_hex(16))
    try:
        response = await handler(request)
    except ProxyError as error:
        log.info("%s %s %s %s: %s", request_id.get(), request.method, request.path, error.status, error)
        response = _failed(error, {})
    except web.HTTPRequestEntityTooLarge as error:
        response = _failed(TooLarge(error.text or "the body is too large"), {})
    except web.HTTPException as error:
        response = _failed(_of_http(error, request), {})
    except web.RequestPayloadError as error:
        response = _failed(BadRequest(f"the body cannot be read: {error}"), {})
    except ConnectionError:
        raise  # the client has gone
    except Exception:  # the edge of the server: a bug is answered as one, and logged whole
        log.exception("%s failed inside the proxy", request_id.get())
        response = _failed(ProxyError("the proxy failed; its log says why"), {})
    if not response.prepared:
        response.headers["x-request-id"] = request_id.get()
    return response


def _of_http(error: web.HTTPException, request: web.Request) -> ProxyError:
    kind = NotFound if error.status == 404 else BadRequest
    failure = kind(f"{request.method} {request.path}: {error.reason}", code=error.reason.lower().replace(" ", "_"))
    failure.status = error.status
    return failure


def _failed(error: ProxyError, headers: Mapping[str, str]) -> web.Response:
    if error.retry_after is not None or error.status == 503:
        after = _RETRY_AFTER_S if error.retry_after is None else math.ceil(error.retry_after)
        headers = {"Retry-After": str(after), **headers}
    return web.Response(status=error.status, body=error.json(), content_type="application/json", headers=headers)


def _end_to_end(headers: Mapping[str, str]) -> dict[str, str]:
    """What engines get to see of a client's headers: credentials, tracing and extensions."""
    lowered = ((name.lower(), value) for name, value in headers.items())
    return {
        name: value
        for name, value in lowered
        if name in _FORWARDED or (name.startswith("x-") and name not in _NOT_FORWARDED)
    }
