"""Engines behind the Services of a Kubernetes namespace: its EndpointSlices (discovery.k8s.io/v1) with certain labels,
a Service's own among them. They are listed once and then watched; nothing is written there.

    k8s+http://prod?selector=app=encoder&port=http

needs `list` and `watch` of `endpointslices` in that namespace. The pods' readiness is the cluster's affair: who is not
ready, or is being ended, is not listed.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import aclosing
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import orjson

from proxy.discovery.base import Say, Unreadable, joined
from proxy.http.client import Client, ConnectFailed, Cut, Exchange, Late, system_trust
from proxy.settings.endpoint import Endpoint
from proxy.settings.fleet import FleetSettings

_CONNECT_S = 5.0
_LIST_S = 30.0
_WATCH_S = 240  # until the server ends a watch, which then begins again
_SILENCE_S = 300.0  # beyond it a watch has ended unheard
_PAUSE_S = 0.2  # between two watches
_LINE_LIMIT = 16 << 20
_GONE = 410  # what has happened since is not known any more: list again


class Slices:
    """See Finder."""

    def __init__(self, settings: FleetSettings) -> None:
        self._api = settings.kubernetes_api.rstrip("/")
        self._credentials = settings.kubernetes_credentials

    async def watch(self, endpoint: Endpoint, say: Say) -> None:
        client = Client(_CONNECT_S, tls=lambda: _trust(self._credentials / "ca.crt"))
        client.open()
        try:
            await self._watch(client, endpoint, say)
        except (ConnectFailed, Cut, OSError) as error:
            raise Unreadable(f"{self._api} {error}") from None
        except Late:
            raise Unreadable(f"{self._api} did not answer in time") from None
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise Unreadable(f"{self._api} tells of no EndpointSlices: {error!r}") from None
        finally:
            await client.close()

    async def _watch(self, client: Client, endpoint: Endpoint, say: Say) -> None:
        said = await self._listed(client, endpoint)
        slices = {_name(one): one for one in said["items"] or ()}
        version = said["metadata"]["resourceVersion"]
        say(_netlocs(slices, endpoint))
        while True:
            async with aclosing(self._events(client, endpoint, version)) as events:
                async for event in events:
                    kind, about = event["type"], event["object"]
                    if kind == "ERROR":
                        if about.get("code") == _GONE:
                            return
                        raise Unreadable(f"{self._api}: {about.get('message')}")
                    version = about["metadata"]["resourceVersion"]
                    if kind == "BOOKMARK":
                        continue
                    if kind == "DELETED":
                        slices.pop(_name(about), None)
                    else:
                        slices[_name(about)] = about
                    say(_netlocs(slices, endpoint))
            await asyncio.sleep(_PAUSE_S)

    async def _listed(self, client: Client, endpoint: Endpoint) -> Mapping[str, Any]:
        async with await self._asked(client, endpoint) as answer:
            answer.patience(_LIST_S)
            data = await answer.read()
            if answer.status != 200:
                raise Unreadable(f"{self._api} answers {answer.status}: {_message(data)}")
        found: Mapping[str, Any] = _parsed(data)
        return found

    async def _events(self, client: Client, endpoint: Endpoint, version: str) -> AsyncGenerator[Any, None]:
        since = {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": _WATCH_S, "resourceVersion": version}
        async with await self._asked(client, endpoint, **since) as answer:
            answer.patience(_SILENCE_S, each=True)
            if answer.status != 200:
                data = await answer.read()
                yield {"type": "ERROR", "object": {"code": answer.status, "message": _message(data)}}
                return
            held = b""
            while piece := await answer.chunk():
                *lines, held = (held + piece).split(b"\n")
                if len(held) > _LINE_LIMIT:
                    raise Unreadable(f"{self._api} sends a line without an end")
                for line in filter(None, lines):
                    yield _parsed(line)

    async def _asked(self, client: Client, endpoint: Endpoint, **query: Any) -> Exchange:
        namespace = urlsplit(endpoint.url).hostname
        query["labelSelector"] = endpoint.asked["selector"]
        path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices?{urlencode(query)}"
        token = await asyncio.to_thread(_read, self._credentials / "token")  # the kubelet writes it anew each hour
        fields = "accept: application/json\r\n" + (f"authorization: Bearer {token}\r\n" if token else "")
        exchange = client.request("GET", self._api, path, fields)
        exchange.patience(_LIST_S)
        return exchange


def _netlocs(slices: Mapping[str, Mapping[str, Any]], endpoint: Endpoint) -> list[str]:
    """Of every pod that is ready one address: those of IPv4 come first."""
    found: dict[str, str] = {}
    for one in sorted(slices.values(), key=lambda one: str(one.get("addressType"))):
        port = _port(one.get("ports") or (), endpoint.asked.get("port"))
        if port is not None:
            for pod, address in _ready(one.get("endpoints") or ()):
                found.setdefault(pod, joined(address, port))
    return sorted(set(found.values()))


def _ready(endpoints: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for one in endpoints:
        conditions = one.get("conditions") or {}
        if one.get("addresses") and conditions.get("ready") is not False and not conditions.get("terminating"):
            address = one["addresses"][0]
            yield (one.get("targetRef") or {}).get("uid") or address, address


def _port(ports: Iterable[Mapping[str, Any]], asked: str | None) -> int | None:
    """By its name or number; without either the only one. None: this slice has it not."""
    if asked is not None and asked.isdecimal():
        return int(asked)
    named = [one["port"] for one in ports if one.get("port") and asked in (None, one.get("name"))]
    return named[0] if len(named) == 1 else None


def _name(one: Mapping[str, Any]) -> str:
    name: str = one["metadata"]["name"]
    return name


def _parsed(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise Unreadable(f"the API server speaks no JSON: {error}") from None


def _message(data: bytes) -> str:
    try:
        return str(orjson.loads(data)["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return data[:200].decode("utf-8", "replace")


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except FileNotFoundError:
        return ""


def _trust(file: Path) -> ssl.SSLContext:
    return _of(str(file), file.stat().st_mtime_ns) if file.exists() else system_trust()


@cache
def _of(file: str, changed: int) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=file)
