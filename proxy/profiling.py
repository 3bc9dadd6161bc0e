"""Profilers of engines, started and stopped together. What they record stays with the engines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from proxy.balancer.fleet import Fleet
from proxy.core import Instance, Stage, State, field_lines
from proxy.errors import EngineFailed, NoInstance, ProxyError, Refused
from proxy.http.message import Response, json_response
from proxy.http.router import Audience, Route, post
from proxy.http.server import Request
from proxy.upstream import Upstream

log = logging.getLogger(__name__)

_TIMEOUT_S = 60.0  # stopping writes the trace out
_NO_PROFILER = 404


class Profiling:
    def __init__(self, fleet: Fleet, upstream: Upstream, authorized: Callable[[Request], Mapping[str, str]]) -> None:
        """`authorized`: the headers that engines get of a call. Raises Unauthorized."""
        self._fleet = fleet
        self._upstream = upstream
        self._authorized = authorized

    def routes(self) -> list[Route]:
        return [post(path, self.pass_on, Audience.ADMINS) for path in ("/start_profile", "/stop_profile")]

    async def pass_on(self, request: Request) -> Response:
        """Send the call to every READY engine: 200 with each one's status, or the first error of one that has a
        profiler. Raises NoInstance where none has."""
        headers = self._authorized(request)
        asked = [instance for instance in self._fleet if instance.state is State.READY]
        answers = await asyncio.gather(*(self._ask(instance, request.path, headers) for instance in asked))
        statuses = {i.url: 200 if error is None else error.status for i, error in zip(asked, answers, strict=True)}
        failed = [error for error in answers if error is not None and error.status != _NO_PROFILER]
        if failed:
            raise failed[0]
        if all(status == _NO_PROFILER for status in statuses.values()):
            raise NoInstance("no engine that is ready here has a profiler", retryable=False)
        return json_response({"engines": statuses})

    async def _ask(self, instance: Instance, path: str, headers: Mapping[str, str]) -> ProxyError | None:
        call = self._upstream.post(instance, Stage.PROXY, path, b"", field_lines(headers), _TIMEOUT_S)
        try:
            async with call as answer:
                await answer.read()
        except EngineFailed as error:
            if not isinstance(error, Refused) or error.status != _NO_PROFILER:
                log.warning("POST %s at %s: %s", path, instance.netloc, error)
            return error
        return None
