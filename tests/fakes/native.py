"""Scripted native engines: an encoder, and a language engine for each role, speaking the native wire contract.

A language engine says `pieces`, whatever it is asked. `calls` holds what it was sent; `aborted` counts the calls whose
caller hung up; `running` is the number of calls it is in.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

import aiohttp
from aiohttp import web
from blake3 import blake3

from tests.fakes.faults import Fault, Kind

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PIECES = ("Hel", "lo, ", "wörld", " 🙂")


@dataclass(frozen=True)
class Call:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def id(self) -> str:
        return self.headers["x-request-id"]


class Engine:
    """What every scripted engine has. `async with` starts and stops it on a free port."""

    role = "both"
    own = False  # one of our family, whose warm-up request is answered with nothing, fails never, and is no call

    def __init__(self, pieces: tuple[str, ...] = PIECES) -> None:
        self.pieces = pieces
        self.calls: list[Call] = []
        self.faults: deque[Fault] = deque()
        self.always: Fault | None = None
        self.running = 0
        self.aborted = 0
        self.healthy = True
        self.streamed = b""  # all bytes of the last stream
        self.gate: asyncio.Event | None = None  # when set to an event: calls wait for it before they answer
        self.credential: str | None = None  # when set: everything but /health asks for it
        self.tls: ssl.SSLContext | None = None  # when set before the start: what it listens with
        self.port = 0
        self._runner: web.AppRunner | None = None
        self.changed = asyncio.Condition()

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def netloc(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; after a `stop`, on the same port again."""
        app = web.Application(client_max_size=1 << 28, middlewares=[self._keyed])
        app.add_routes(self.routes())
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True, ssl_context=self.tls).start()
        self.port = self._runner.addresses[0][1]

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health", self._health),
            web.get("/info", self._info),
            web.get("/v1/models", self._models),
            web.post("/v1/chat/completions", self._generate),
            web.post("/v1/completions", self._generate),
        ]

    async def stop(self) -> None:
        """Refuse connections from now on, and cut those that are open."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    def fail(self, *faults: Fault) -> None:
        """The next calls fail so, one fault each."""
        self.faults.extend(faults)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds, which only calls to this engine can make true."""
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(condition)

    # ---- routes

    @web.middleware
    async def _keyed(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.getall("authorization", [])
        if self.credential is not None and request.path != "/health" and given != [f"Bearer {self.credential}"]:
            return web.json_response({"error": {"message": "who are you?"}}, status=401)
        return await handler(request)

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({}, status=200 if self.healthy else 503)

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response({"engine": "triptych", "version": "0", "role": self.role, "model": "tiny"})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "tiny", "object": "model", "owned_by": "test"}]})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if self.own and request.headers.get("x-request-id") == "warm-up":
            return web.json_response({})
        call = Call(request.path, {k.lower(): v for k, v in request.headers.items()}, await request.json())
        self.calls.append(call)
        self.running += 1
        try:
            await self._announce()
            if self.gate is not None:
                await self.gate.wait()
            fault = self.faults.popleft() if self.faults else self.always
            if fault is not None and (answer := await self._fail(fault, request, call)) is not None:
                return answer
            return await self.answer(request, call)
        except (asyncio.CancelledError, ConnectionError):
            self.aborted += 1
            raise
        finally:
            self.running -= 1
            await asyncio.shield(self._announce())

    async def _announce(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def answer(self, request: web.Request, call: Call) -> web.StreamResponse:
        raise NotImplementedError

    # ---- failing

    async def _fail(self, fault: Fault, request: web.Request, call: Call) -> web.StreamResponse | None:
        """A failure's answer; None where only the answer itself can fail, which `_body` and `_stream` see to."""
        if fault.kind is Kind.RESET:
            _cut(request)
        elif fault.kind is Kind.HANG:
            await asyncio.Event().wait()
        elif fault.kind is Kind.STATUS:
            again = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
            return web.json_response(fault.body(), status=fault.status, headers=again)
        elif fault.kind is Kind.GARBAGE:
            return web.Response(text="<html>welcome to nginx</html>", content_type="text/html")
        elif call.body.get("stream"):
            return await self._stream(request, call, fault)
        elif fault.kind is Kind.ERROR_EVENT:
            return web.json_response(fault.body())
        elif fault.kind in (Kind.TRUNCATED, Kind.SLOW):
            return await self._dripped(request, await self.reply(call), fault.kind is Kind.TRUNCATED)
        elif fault.kind is Kind.STALL:
            await asyncio.Event().wait()
        return None

    async def reply(self, call: Call) -> dict[str, Any]:
        """The whole answer of an unstreamed call."""
        raise NotImplementedError

    async def _dripped(self, request: web.Request, reply: dict[str, Any], cut: bool) -> web.StreamResponse:
        data = json.dumps(reply).encode()
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(data))})
        await response.prepare(request)
        for start in range(0, len(data) // 2 if cut else len(data), 16):
            await response.write(data[start : start + 16])
            await asyncio.sleep(0)
        if cut:
            _cut(request)
        await response.write_eof()
        return response

    async def _stream(self, request: web.Request, call: Call, fault: Fault | None = None) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        self.streamed = b""
        for number, event in enumerate(self._events(call)):
            if fault is not None and number == fault.after + 1:  # the first event has only the role
                await self._break(fault, request, response)
            if fault is not None and fault.kind is Kind.NO_DONE and event == b"data: [DONE]\n\n":
                break
            await self._write(response, event, 3 if fault is not None and fault.kind is Kind.SLOW else len(event))
        await response.write_eof()
        return response

    async def _write(self, response: web.StreamResponse, event: bytes, size: int) -> None:
        self.streamed += event
        for start in range(0, len(event), size):
            await response.write(event[start : start + size])
            await asyncio.sleep(0)

    async def _break(self, fault: Fault, request: web.Request, response: web.StreamResponse) -> None:
        if fault.kind is Kind.TRUNCATED:
            _cut(request)
        if fault.kind is Kind.STALL:
            await asyncio.Event().wait()
        if fault.kind is Kind.ERROR_EVENT:
            await self._write(
                response, b"data: " + json.dumps(fault.body()).encode() + b"\n\ndata: [DONE]\n\n", 1 << 20
            )
            raise asyncio.CancelledError  # nothing follows

    def _events(self, call: Call) -> list[bytes]:
        """One token per piece: its number is its id. Tokens that the call continues are not said again."""
        chat = call.path.endswith("/chat/completions")
        done = len(call.body.get("continue_token_ids", ()))

        def event(text: str | None, finish: str | None, token: int | None = None) -> bytes:
            choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
            if chat:
                choice["delta"] = {} if finish else {"role": "assistant"} if text is None else {"content": text}
            else:
                choice["text"] = text or ""
            if token is not None and call.body.get("return_token_ids"):
                choice["token_ids"] = [token]
            kind = "chat.completion.chunk" if chat else "text_completion"
            value = {"id": f"chatcmpl-{call.id}", "object": kind, "created": 1, "model": "tiny", "choices": [choice]}
            return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"

        said = [event(piece, None, token) for token, piece in enumerate(self.pieces)][done:]
        events = [event(None, None), *said, event(None, "stop")]
        return [*events, b"data: [DONE]\n\n"]


class Encoder(Engine):
    """Reports one entry per distinct item, with a grid of its own: before it has computed it, where that is asked for
    and `computing` is an event, for which it then waits. `breaks`: how what it has announced fails. `cached`: what it
    says of each; None: nothing.
    """

    role = "encode"
    own = True
    computing: asyncio.Event | None = None
    breaks: Fault | None = None
    cached: bool | None = None

    async def answer(self, request: web.Request, call: Call) -> web.StreamResponse:
        if self.computing is None or not call.body.get("announce"):
            return web.json_response(await self.reply(call))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: " + json.dumps(await self.reply(call)).encode() + b"\n\n")
        await self.computing.wait()
        if self.breaks is not None:
            await self._break(self.breaks, request, response)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def reply(self, call: Call) -> dict[str, Any]:
        entries: dict[str, dict[str, Any]] = {}
        for index, part in enumerate(call.body["messages"][0]["content"]):
            mm_hash = part.get("uuid") or blake3(json.dumps(part).encode()).hexdigest()
            entry = entries.setdefault(
                mm_hash,
                {
                    "modality": part["type"].partition("_")[0],
                    "item_indices": [],
                    "metadata": {"image_grid_thw": [1, 2 * int(mm_hash[0], 16) + 2, 8]},
                    "num_tokens": 12,
                    "where": {"at": self.netloc},
                }
                | ({} if self.cached is None else {"cached": self.cached}),
            )
            entry["item_indices"].append(index)
        choices = [{"index": 0, "message": {"role": "assistant", "content": ""}, "finish_reason": "stop"}]
        return {"id": f"chatcmpl-{call.id}", "choices": choices, "ec_transfer_params": entries}


class Language(Engine):
    """A combined engine, and what prefill and decode share."""

    own = True

    async def answer(self, request: web.Request, call: Call) -> web.StreamResponse:
        if call.body.get("stream"):
            return await self._stream(request, call)
        return web.json_response(await self.reply(call))

    async def reply(self, call: Call) -> dict[str, Any]:
        text = "".join(self.pieces)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        if call.path.endswith("/chat/completions"):
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        usage = {"prompt_tokens": 7, "completion_tokens": len(self.pieces), "total_tokens": 7 + len(self.pieces)}
        return {
            "id": f"chatcmpl-{call.id}",
            "object": "chat.completion",
            "created": 1,
            "model": "tiny",
            "choices": [choice],
            "usage": usage,
        }


class Prefill(Language):
    role = "prefill"

    async def reply(self, call: Call) -> dict[str, Any]:
        """In pull the parameters that decode will want; in push nothing but the answer."""
        pull = call.body["kv_transfer_params"].get("remote_block_ids") is None
        handoff = {"do_remote_prefill": True, "do_remote_decode": False, "remote_request_id": f"chatcmpl-{call.id}"}
        return await super().reply(call) | {"kv_transfer_params": handoff | {"where": self.netloc} if pull else None}


class Decode(Language):
    """In push it asks the metaserver for its prefill first, and fails its call with that answer if it is no 200."""

    role = "decode"

    def __init__(self, pieces: tuple[str, ...] = PIECES) -> None:
        super().__init__(pieces)
        self.asks = True  # False: as if the prompt were cached here
        self.callbacks: list[tuple[int, dict[str, Any]]] = []  # (status, answer) of each metaserver call

    async def answer(self, request: web.Request, call: Call) -> web.StreamResponse:
        params = call.body["kv_transfer_params"]
        if "metaserver" in params and self.asks:
            status, said = await self._ask(params["metaserver"], call)
            if status != 200:
                return web.json_response(said, status=status)
        return await super().answer(request, call)

    async def _ask(self, url: str, call: Call) -> tuple[int, dict[str, Any]]:
        chat = call.path.endswith("/chat/completions")
        descriptor = {
            "token_ids": [],
            "request_id": f"chatcmpl-{call.id}" if chat else f"cmpl-{call.id}-0",
            "do_remote_prefill": False,
            "do_remote_decode": True,
            "remote_block_ids": [[1, 2]],
            "remote_host": "127.0.0.1",
            "offer": {"ticket": call.id},
        }
        async with aiohttp.ClientSession() as session, session.post(url, json=descriptor) as response:
            self.callbacks.append((response.status, await response.json()))
            return self.callbacks[-1]


class Turning(Prefill, Decode):
    """Answers by the role that it has, which POST /role changes, after `turning` where that is an event."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = self.started_as = role
        self.turning: asyncio.Event | None = None
        self.asked: list[dict[str, Any]] = []  # bodies of POST /role
        self.hung_up = 0  # callers that did not wait for its answer
        self.refusal: Fault | None = None

    def routes(self) -> list[web.RouteDef]:
        return [*super().routes(), web.post("/role", self._turn)]

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"role": self.role}, status=200 if self.healthy else 503)

    async def _info(self, request: web.Request) -> web.Response:
        told = {"engine": "triptych", "version": "0", "role": self.role, "model": "tiny", "started_as": self.started_as}
        return web.json_response(told)

    async def _turn(self, request: web.Request) -> web.Response:
        self.asked.append(await request.json())
        await self._announce()
        try:
            if self.turning is not None:
                await self.turning.wait()
        except asyncio.CancelledError:
            self.hung_up += 1
            raise
        if self.refusal is not None:
            return web.json_response(self.refusal.body(), status=self.refusal.status)
        self.role = self.asked[-1]["role"]
        return web.json_response({"role": self.role})

    async def answer(self, request: web.Request, call: Call) -> web.StreamResponse:
        if self.role == "decode":
            return await Decode.answer(self, request, call)
        return await Language.answer(self, request, call)

    async def reply(self, call: Call) -> dict[str, Any]:
        return await (Prefill if self.role == "prefill" else Language).reply(self, call)


ENGINES: dict[str, type[Engine]] = {"e": Encoder, "p": Prefill, "d": Decode, "b": Language}
"""By the letter of `deployment`'s topology."""


def _cut(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()
    raise asyncio.CancelledError  # aiohttp's own word for a connection that is gone


@asynccontextmanager
async def started(engines: list[Engine]) -> AsyncIterator[None]:
    """All of `engines` up within."""
    up: list[Callable[[], Awaitable[None]]] = []
    try:
        for engine in engines:
            await engine.start()
            up.append(engine.stop)
        yield
    finally:
        for stop in itertools.chain(up):
            await stop()
