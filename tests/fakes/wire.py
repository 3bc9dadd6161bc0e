"""Engines without sockets: each call waits until the test says how it ends. For driving the dispatcher alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
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

    def __init__(self, data: bytes, content_type: str, broken: ProxyError | None = None) -> None:
        self._data = data
        self._broken = broken
        self.content_type = content_type

    async def read(self) -> bytes:
        if self._broken is not None:
            raise self._broken
        return self._data

    def pipe(self, feed: Callable[[bytes], None], broken: Callable[[ProxyError], None], *_: object) -> None:
        feed(self._data)
        if self._broken is not None:
            broken(self._broken)

    def enough(self) -> None:
        """It is whole already."""


class Wire:
    """Stands where Upstream does. `calls` are those that wait for their ending."""

    def __init__(self, metaserver: Metaserver) -> None:
        self.timeouts = Timeouts(
            **dict.fromkeys(("connect", "encode", "prefill", "first_token"), 60.0), stream_idle=60.0, answer=60.0
        )
        self.calls: list[Pending] = []
        self._metaserver = metaserver

    @asynccontextmanager
    async def post(
        self, instance: Instance, stage: Stage, path: str, body: Any, headers: Mapping[str, str]
    ) -> AsyncIterator[Answer]:
        data = body if isinstance(body, bytes | bytearray) else b"".join(body)
        call = Pending(instance, stage, orjson.loads(data), headers["x-request-id"])
        self.calls.append(call)
        try:
            ending = await call.ending
            if ending == "ok" and stage is Stage.DECODE:
                await self._ask(call)
        finally:
            if call in self.calls:
                self.calls.remove(call)
        yield _answer(call, ending)

    async def _ask(self, call: Pending) -> None:
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
