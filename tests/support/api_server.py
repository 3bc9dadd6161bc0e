"""The part of a Kubernetes API server that tells of EndpointSlices: lists, watches, versions that are too old."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
from aiohttp import web

NAMESPACE = "prod"


class ApiServer:
    """Slices by name, in one namespace. Every change has a version; `forget` makes it know none of the past."""

    def __init__(self, token: str = "") -> None:
        self.url = ""
        self.version = 100
        self.lists = self.watches = 0
        self.refuses: tuple[int, str] | None = None  # a status and why, instead of any answer
        self.answers: Any = None  # instead of a list
        self._token = token
        self._slices: dict[str, Mapping[str, Any]] = {}
        self._watchers: list[asyncio.Queue[bytes | None]] = []

    def put(self, name: str, *endpoints: Mapping[str, Any], labels: str = "app=enc", **more: Any) -> None:
        """`endpoints`: see `endpoint`. `more`: ports, addressType."""
        self.version += 1
        meta = {"name": name, "labels": dict([labels.split("=")]), "resourceVersion": str(self.version)}
        one = {"metadata": meta, "addressType": "IPv4", "ports": [{"name": "http", "port": 8000}], **more}
        known = name in self._slices
        self._slices[name] = {**one, "endpoints": [*endpoints]}
        self._tell("MODIFIED" if known else "ADDED", self._slices[name])

    def delete(self, name: str) -> None:
        self.version += 1
        gone = self._slices.pop(name)
        self._tell("DELETED", {**gone, "metadata": {**gone["metadata"], "resourceVersion": str(self.version)}})

    def bookmark(self) -> None:
        self.version += 1
        self._tell("BOOKMARK", {"metadata": {"resourceVersion": str(self.version)}})

    def error(self, code: int, message: str) -> None:
        self._tell("ERROR", {"kind": "Status", "code": code, "message": message})

    def end(self) -> None:
        """Every watch ends in good order, as it does after some minutes."""
        for watcher in self._watchers:
            watcher.put_nowait(None)

    def _tell(self, kind: str, about: Mapping[str, Any]) -> None:
        for watcher in self._watchers:
            watcher.put_nowait(orjson.dumps({"type": kind, "object": about}) + b"\n")

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if self.refuses is not None:
            status, message = self.refuses
            return web.json_response({"kind": "Status", "message": message}, status=status)
        if request.headers.get("authorization", "") != (f"Bearer {self._token}" if self._token else ""):
            return web.json_response({"kind": "Status", "message": "Unauthorized"}, status=401)
        label, _, value = request.query["labelSelector"].partition("=")
        if "watch" not in request.query:
            self.lists += 1
            if self.answers is not None:
                return web.json_response(self.answers)
            items = [one for one in self._slices.values() if one["metadata"]["labels"].get(label) == value]
            return web.json_response({"metadata": {"resourceVersion": str(self.version)}, "items": items})
        assert self.answers or request.query["resourceVersion"] == str(self.version), (
            "nothing may be missed between list and watch"
        )
        self.watches += 1
        return await self._watch(request)

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        told: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._watchers.append(told)
        response = web.StreamResponse(headers={"content-type": "application/json"})
        try:
            await response.prepare(request)
            while (line := await told.get()) is not None:
                await response.write(line[:7])  # lines do not come in one piece each
                await response.write(line[7:])
        finally:
            self._watchers.remove(told)
        return response


def endpoint(address: str, *, uid: str | None = None, **conditions: bool) -> Mapping[str, Any]:
    found: dict[str, Any] = {"addresses": [address], "conditions": {"ready": True, **conditions}}
    return {**found, "targetRef": {"kind": "Pod", "uid": uid}} if uid else found


def endpoints(*addresses: str) -> Sequence[Mapping[str, Any]]:
    return [endpoint(address) for address in addresses]


@asynccontextmanager
async def api_server(token: str = "", tls: ssl.SSLContext | None = None) -> AsyncIterator[ApiServer]:
    server = ApiServer(token)
    app = web.Application()
    app.router.add_get(f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices", server._handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        server.url = f"http{'s' if tls else ''}://localhost:{runner.addresses[0][1]}"
        yield server
    finally:
        server.end()
        await runner.cleanup()
