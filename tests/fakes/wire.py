"""Engines without sockets: each call waits until the test says how it ends. For driving the dispatcher alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from proxy.callbacks import Metaserver
from proxy.core import Instance, Stage
from proxy.errors import Broken, ProxyError, Refused, Unreachable
from proxy.upstream import Timeouts

ENDINGS = ("ok", "refused", "broken", "500", "503", "429", "400", "html", "error", "cut")
CONTENT = b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null,"token_ids":[1]}]}\n\n'
END = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


@dataclass(eq=False)
class Pending:
    """A call that an engine is in."""

    instance: Instance
    stage: Stage
    body: Mapping[str, Any]
    request_id: str
    ending: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Answer:
    """A 200 whose body is here already."""

    done = True
    enough = False

    def __init__(self, data: bytes, content_type: str, broken: ProxyError | None = None) -> None:
        self._data = data
        self._broken = broken
        self._content_type = content_type

    def header(self, name: str) -> str:
        return {"content-type": self._content_type}.get(name, "")

    def patience(self, seconds: float | None, *, each: bool = False) -> None:
        """Nothing is waited for."""

    async def read(self) -> bytes:
        if self._broken is not None:
            raise self._broken
        return self._data

    def shortcut(self, shortcut: object) -> None:
        """There are no chunks."""

    def pause(self) -> None:
        """It is whole already."""

    resume = pause

    def pipe(self, feed: Callable[[bytes], None], broken: Callable[[ProxyError], None], *_: object) -> None:
        feed(self._data)
        if self._broken is not None:
            broken(self._broken)


class Post:
    """A call that `async with` makes."""

    def __init__(self, wire: Wire, call: Pending) -> None:
        self._wire = wire
        self._call = call

    def patience(self, seconds: float | None, *, each: bool = False) -> None:
        """It ends when the test says so."""

    async def __aenter__(self) -> Answer:
        wire, call = self._wire, self._call
        wire.calls.append(call)
        try:
            ending = await call.ending
            if ending == "ok" and call.stage is Stage.DECODE:
                await wire.ask(call)
        finally:
            if call in wire.calls:
                wire.calls.remove(call)
        return _answer(call, ending)

    async def __aexit__(self, *_: object) -> None:
        """Nothing is open."""


class Wire:
    """Stands where Upstream does. `calls` are those that wait for their ending."""

    def __init__(self, metaserver: Metaserver) -> None:
        self.timeouts = Timeouts(
            **dict.fromkeys(("connect", "encode", "prefill", "first_token"), 60.0), stream_idle=60.0, answer=60.0
        )
        self.calls: list[Pending] = []
        self._metaserver = metaserver

    def post(self, instance: Instance, stage: Stage, path: str, body: Any, fields: str, seconds: float) -> Post:
        data = body if isinstance(body, bytes | bytearray) else b"".join(body)
        named = dict(line.split(": ", 1) for line in fields.splitlines())
        return Post(self, Pending(instance, stage, orjson.loads(data), named["x-request-id"]))

    async def ask(self, call: Pending) -> None:
        """What a decode engine does first in push."""
        if "metaserver" in call.body.get("kv_transfer_params", {}):
            try:
                await self._metaserver.find(f"chatcmpl-{call.request_id}").prefill({"remote_block_ids": [[1]]})
            except ProxyError as error:
                raise Refused(error.status, error.json(), stage=Stage.DECODE) from None


def _answer(call: Pending, ending: str) -> Answer:
    stage, stream = call.stage, bool(call.body.get("stream"))
    kind = "text/event-stream" if stream else "application/json"
    if ending == "refused":
        raise Unreachable("nobody listens", stage=stage)
    if ending == "broken":
        raise Broken("reset", stage=stage)
    if ending.isdigit():
        raise Refused(int(ending), b"scripted", stage=stage, retry_after="5" if ending in ("429", "503") else None)
    if ending == "html":
        return Answer(b"<html>", "text/html")
    if ending == "error":
        data = b'{"error":{"message":"boom","code":500}}'
        return Answer(b"data: " + data + b"\n\n" if stream else data, kind)
    cut = Broken("cut", stage=stage) if ending == "cut" else None
    if stream:
        said = b"" if "continue_token_ids" in call.body else CONTENT
        return Answer(said + END if cut is None else said, kind, cut)
    return Answer(orjson.dumps(_whole(call)), kind, cut)


def _whole(call: Pending) -> dict[str, Any]:
    answer: dict[str, Any] = {"choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}]}
    if call.stage is Stage.PREFILL:
        answer["kv_transfer_params"] = {"remote_block_ids": [[1]]}
    if call.stage is Stage.ENCODE:
        parts = call.body["messages"][0]["content"]
        answer["ec_transfer_params"] = {
            part["uuid"]: {"modality": "image", "item_indices": [number], "metadata": {"image_grid_thw": [1, 2, 2]}}
            for number, part in enumerate(parts)
        }
    return answer
