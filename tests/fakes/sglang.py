"""Scripted SGLang servers, 0.5.10 and 0.5.23, with the failure behaviour that was measured on the real ones.

Encoders push what they make straight to the server that waits, over ZMQ, errors too. A language server of 0.5.23 dies
of every error and every abort while it waits for an embedding; one of 0.5.10 answers with the error. Prefill and decode
wait for each other in a room, for ever; a room that is used twice ends both processes.

Metadata travel as JSON here, not as the pickles of the real ones. An item's embedding is the BLAKE3 of its URL.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import zmq
import zmq.asyncio
from aiohttp import web
from blake3 import blake3

from tests.fakes.native import Call, Engine
from tests.fakes.native import Language as Native

OLD, NEW = "0.5.10", "0.5.23"
ANYBODY = "2.2.2.2"  # the bootstrap host of a warm-up without a peer
PNG = "data:image/png;base64,iVBORw0KGgo"


def embedding(url: str) -> bytes:
    return blake3(url.encode()).digest()


def readable(url: str) -> bool:
    return url.startswith((PNG, "http")) and "broken" not in url


@dataclass
class Room:
    """Where one prefill and one decode meet."""

    roles: list[str] = field(default_factory=list)
    full: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class World:
    """What the servers of one deployment share."""

    version: str = NEW
    encoders: list[str] = field(default_factory=list)  # what language servers list; empty: they encode by themselves
    rooms: dict[int, Room] = field(default_factory=dict)

    def engines(self) -> dict[str, Any]:
        """Factories by the letter of `deployment`'s topology."""
        return {
            "e": lambda: Encoder(self.version),
            "p": lambda: Language(self, "prefill"),
            "d": lambda: Language(self, "decode"),
            "b": lambda: Language(self, "null"),
        }


@dataclass
class Part:
    """One /encode at an encoder, and who waits for it."""

    started: asyncio.Event = field(default_factory=asyncio.Event)
    read: asyncio.Event = field(default_factory=asyncio.Event)
    error: str | None = None
    urls: set[str] = field(default_factory=set)
    complete: asyncio.Event = field(default_factory=asyncio.Event)


class Encoder(Engine):
    """`forwards`: cleared, embeddings wait after their media were read. `failing`: the model fails instead."""

    role = "encode"

    def __init__(self, version: str = NEW) -> None:
        super().__init__()
        self.old = version == OLD
        self.forwards = asyncio.Event()
        self.forwards.set()
        self.failing = False
        self.parts: dict[str, Part] = {}
        self.pushed: list[dict[str, Any]] = []
        self._context: zmq.asyncio.Context
        self._pushing: set[asyncio.Task[None]] = set()

    def routes(self) -> list[web.RouteDef]:
        routes = [
            web.get("/health", self._health),
            web.get("/openapi.json", self._openapi),
            web.post("/encode", self._generate),
            web.post("/scheduler_receive_url", self._receive_url),
        ]
        return routes if self.old else [*routes, web.post("/scheduler_receive_meta_data", self._sizes)]

    async def start(self) -> None:
        self._context = zmq.asyncio.Context()
        await super().start()

    async def stop(self) -> None:
        for task in list(self._pushing):
            task.cancel()
        await super().stop()
        self._context.destroy(linger=0)

    async def _openapi(self, request: web.Request) -> web.Response:
        return web.json_response({"paths": {route.path: {} for route in self.routes()}})

    async def _receive_url(self, request: web.Request) -> web.Response:
        body = await request.json()
        part = self.parts.setdefault(body["req_id"], Part())
        if not self.old:
            await part.started.wait()
        part.urls.add(body["receive_url"])
        if len(part.urls) == body["receive_count"]:
            part.complete.set()
        return web.json_response(None)

    async def _sizes(self, request: web.Request) -> web.Response:
        body = await request.json()
        part = self.parts.setdefault(body["req_id"], Part())
        await part.read.wait()
        if part.error is not None:
            return web.json_response({"status": "error", "message": part.error, "req_id": body["req_id"]}, status=500)
        return web.json_response({**body, "embedding_size": 32, "embedding_len": 1, "embedding_dim": 32})

    async def answer(self, request: web.Request, call: Call) -> web.StreamResponse:
        body = call.body
        if not {"req_id", "modality", "mm_items", "num_parts", "part_idx"} <= body.keys():
            return self._error(body, "missing or invalid req_id", 400)
        part = self.parts.setdefault(body["req_id"], Part())
        part.started.set()
        urls = [item["url"] if isinstance(item, dict) else item for item in body["mm_items"]]
        if not all(map(readable, urls)):
            return self._refused(body, part, "cannot identify image file", 400)
        part.read.set()
        await self.forwards.wait()
        if self.failing:
            return self._refused(body, part, "out of memory", 500)
        await self._push(body, part, b"".join(map(embedding, urls)))
        return web.json_response(None)

    def _refused(self, body: dict[str, Any], part: Part, error: str, status: int) -> web.Response:
        """The error goes to whoever waits, now or when it has registered; the caller does not wait for that."""
        part.error = error
        part.read.set()
        task = asyncio.get_running_loop().create_task(self._push(body, part, None))
        self._pushing.add(task)
        task.add_done_callback(self._pushing.discard)
        return self._error(body, error, status)

    def _error(self, body: dict[str, Any], message: str, status: int) -> web.Response:
        return web.json_response({"status": "error", "message": message, "req_id": body.get("req_id")}, status=status)

    async def _push(self, body: dict[str, Any], part: Part, data: bytes | None) -> None:
        if body["embedding_port"] is None:
            await part.complete.wait()
            targets = sorted(part.urls)
        else:
            ports = body["embedding_port"] if isinstance(body["embedding_port"], list) else [body["embedding_port"]]
            targets = [f"{body['prefill_host']}:{port}" for port in ports]
        told = {name: body[name] for name in ("req_id", "num_parts", "part_idx", "modality")} | {"error": part.error}
        for target in targets:
            with self._context.socket(zmq.PUSH) as sock:
                sock.connect(f"tcp://{target}")
                await sock.send_multipart([json.dumps(told).encode(), *([] if data is None else [data])])
                sock.linger = 1000
        self.pushed.append(told)


class EmbeddingFailed(Exception):
    pass


@dataclass
class Waiting:
    """A request that waits for its embeddings."""

    count: int | None = None
    parts: dict[int, bytes] = field(default_factory=dict)
    ended: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def got(self, told: dict[str, Any], data: bytes | None) -> None:
        if self.ended.done():
            return
        if told["error"] is not None or data is None:
            self.ended.set_exception(EmbeddingFailed(told["error"]))
        elif self.count not in (None, told["num_parts"]) or told["part_idx"] in self.parts:
            self.ended.set_exception(EmbeddingFailed("parts do not fit together"))
        else:
            self.count = told["num_parts"]
            self.parts[told["part_idx"]] = data
            if len(self.parts) == self.count:
                self.ended.set_result(None)


class Language(Native):
    """`mode`: null, prefill or decode. `embeddings` holds what each request got, `aborts` whom it was told to abort."""

    own = False

    def __init__(self, world: World, mode: str) -> None:
        super().__init__()
        self.world = world
        self.mode = mode
        self.role = {"null": "both"}.get(mode, mode)
        self.crashed = False
        self.embeddings: list[bytes] = []
        self.aborts: list[str] = []
        self.tp_size = 1
        self._waiting: dict[str, Waiting] = {}
        self._rids: dict[str, asyncio.Task[Any]] = {}
        self._context: zmq.asyncio.Context
        self._tasks: set[asyncio.Task[Any]] = set()

    def routes(self) -> list[web.RouteDef]:
        own = [web.get("/server_info", self._server_info), web.post("/abort_request", self._abort)]
        return [route for route in super().routes() if route.path != "/info"] + own

    async def start(self) -> None:
        self._context = zmq.asyncio.Context()
        await super().start()

    async def stop(self) -> None:
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()
        await super().stop()
        self._context.destroy(linger=0)

    async def _server_info(self, request: web.Request) -> web.Response:
        info = {"version": self.world.version, "disaggregation_mode": self.mode, "model_path": "tiny"}
        return web.json_response(info | {"disaggregation_bootstrap_port": 8998, "language_only": self.mode != "decode"})

    async def _abort(self, request: web.Request) -> web.Response:
        rid = (await request.json())["rid"]
        self.aborts.append(rid)
        for name in [name for name in self._rids if name.startswith(rid)]:
            if name in self._waiting and self.world.version == NEW:
                self._crash()
            self._rids[name].cancel()
        await self._announce()
        return web.Response()

    async def answer(self, request: web.Request, call: Call) -> web.StreamResponse:
        rid = call.body.get("rid") or f"own-{len(self.calls)}"
        task = asyncio.current_task()
        assert task is not None
        self._rids[rid] = task
        try:
            urls = [part["image_url"]["url"] for part in _images(call.body)]
            if urls and self.world.encoders and self.mode != "decode":
                await self._embed(rid, urls)
            if self.mode != "null":
                await self._meet(call.body)
            return await super().answer(request, call)
        except EmbeddingFailed as error:
            if self.world.version == NEW:
                self._crash()
                raise asyncio.CancelledError from None  # the connection is gone with the process
            return web.json_response({"object": "error", "message": str(error), "code": 400}, status=400)
        finally:
            del self._rids[rid]

    # ---- rooms

    async def _meet(self, body: dict[str, Any]) -> None:
        if body.get("bootstrap_host") == ANYBODY:
            return
        room = self.world.rooms.setdefault(body["bootstrap_room"], Room())
        room.roles.append(self.mode)
        if room.roles.count(self.mode) > 1:
            self._crash()
        if len(room.roles) == 2:
            room.full.set()
        await room.full.wait()

    # ---- embeddings

    async def _embed(self, rid: str, urls: list[str]) -> None:
        waiting = self._waiting[rid] = Waiting()
        listed = list(self.world.encoders)
        shares = [urls[n * len(urls) // len(listed) : (n + 1) * len(urls) // len(listed)] for n in range(len(listed))]
        shares_by_url = {url: share for url, share in zip(listed, shares, strict=True) if share}
        try:
            for index, (url, share) in enumerate(shares_by_url.items()):
                self._spawn(self._dispatch(rid, waiting, url, share, index, len(shares_by_url)))
            await waiting.ended
            self.embeddings.append(b"".join(waiting.parts[n] for n in sorted(waiting.parts)))
        except asyncio.CancelledError:
            if self.world.version == NEW:
                self._crash()
            raise
        finally:
            del self._waiting[rid]
            await self._announce()

    async def _dispatch(self, rid: str, waiting: Waiting, url: str, urls: list[str], index: int, count: int) -> None:
        """One part: POST /encode, and beside it the registration of each rank."""
        req_id = f"{rid}_local_part_{index}"
        body = {
            "encoder_idx": index,
            "mm_items": urls,
            "num_parts": count,
            "part_idx": index,
            "req_id": req_id,
            "modality": "IMAGE",
            "prefill_host": "127.0.0.1",
            "embedding_port": None,
        }
        if self.world.version == NEW:
            body |= {"encoder_url": url, "time_stats_json": None}
        receivers = [self._receiver() for _ in range(self.tp_size)]
        async with aiohttp.ClientSession() as http:
            encode = asyncio.get_running_loop().create_task(self._post(http, f"{url}/encode", body))
            try:
                for receiver in receivers:
                    told = {
                        "req_id": req_id,
                        "receive_count": self.tp_size,
                        "receive_url": receiver,
                        "modality": "IMAGE",
                    }
                    await self._post(http, f"{url}/scheduler_receive_url", told)
                await encode
            except (aiohttp.ClientError, EmbeddingFailed) as error:
                if self.world.version == NEW and not waiting.ended.done():  # 0.5.10 waits on, for a push
                    waiting.ended.set_exception(EmbeddingFailed(str(error)))
            finally:
                encode.cancel()
                with suppress(BaseException):
                    await encode

    async def _post(self, http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
        async with http.post(url, json=body) as response:
            if response.status != 200:
                raise EmbeddingFailed((await response.json())["message"])

    def _receiver(self) -> str:
        pull = self._context.socket(zmq.PULL)
        port = pull.bind_to_random_port("tcp://127.0.0.1")
        self._spawn(self._receive(pull))
        return f"127.0.0.1:{port}"

    async def _receive(self, pull: zmq.asyncio.Socket) -> None:
        while True:
            first, *rest = await pull.recv_multipart()
            told = json.loads(first)
            waiting = self._waiting.get(told["req_id"].rpartition("_local_part_")[0])
            if waiting is not None:
                waiting.got(told, rest[0] if rest else None)

    def _crash(self) -> None:
        """The process is gone, with every connection."""
        self.crashed = True
        for task in self._rids.values():
            task.cancel()
        self._spawn(self.stop())

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _images(body: dict[str, Any]) -> list[dict[str, Any]]:
    contents = [message["content"] for message in body.get("messages", ())]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if part["type"] == "image_url"]
