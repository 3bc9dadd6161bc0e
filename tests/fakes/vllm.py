"""Scripted vLLM engines, with the failure behaviour that was measured on real ones.

An embedding goes by its key: the part's `uuid`, or a hash of model and media without one; either is hashed once more
with `mm_processor_kwargs`. An encoder publishes what it encodes, and not what it has in its cache, even if somebody has
deleted that. An engine that is given metadata alone and finds nothing under the key ends, unless its connector is of
the kind that fails the request. `seen` tells where each item of each call came from.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from blake3 import blake3

from tests.fakes.native import Call, Language

MEDIA = ("image_url", "video_url", "audio_url", "input_audio")
MODALITIES = {"image_url": "image", "video_url": "video", "audio_url": "audio", "input_audio": "audio"}


@dataclass
class World:
    """What the engines of one deployment share, and how all of them are started."""

    version: str = "0.32.0"
    ec: str = "example"  # example: files, and death of who misses one; mooncake: pushed to who was named, and an error
    kv: str = "nixl"  # nixl | example | mooncake
    trusts_kwargs: bool = True
    files: set[str] = field(default_factory=set)  # embeddings by key
    pushed: set[tuple[str, str]] = field(default_factory=set)  # embeddings, as (to whom, transfer id)
    loses: bool = False  # pushes never arrive
    prefilled: set[str] = field(default_factory=set)  # NIXL, by remote request id; ExampleConnector, by prompt
    transfers: dict[str, asyncio.Event] = field(default_factory=dict)  # Mooncake

    def engines(self) -> dict[str, Any]:
        """Factories by the letter of `deployment`'s topology."""
        return {
            "e": lambda: Encoder(self),
            "p": lambda: Prefill(self),
            "d": lambda: Decode(self),
            "b": lambda: Combined(self),
        }

    @property
    def reports(self) -> bool:
        """Encoders tell handles, and prefill takes metadata."""
        return tuple(map(int, self.version.split(".")[:2])) >= (0, 32)

    def transfer(self, name: str) -> asyncio.Event:
        return self.transfers.setdefault(name, asyncio.Event())


class Failed(Exception):
    """An answer with vLLM's error body."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def body(self) -> dict[str, Any]:
        kind = "BadRequestError" if self.status == 400 else "InternalServerError"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.status}}


class Dead(Exception):
    """An assertion in a worker."""


class Vllm(Language):
    own = False

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.profiles = True
        self.profiled: list[tuple[str, str | None]] = []  # (path, authorization)
        self.encoded: list[str] = []  # keys, in order
        self.seen: list[list[tuple[str, str]]] = []  # (key, whence) of each item of each call
        self.dead = False
        self._ending: asyncio.Task[None] | None = None

    @property
    def served(self) -> list[Call]:
        """The calls without warm-ups."""
        return [call for call in self.calls if call.id != "warm-up"]

    def routes(self) -> list[web.RouteDef]:
        return [
            *(route for route in super().routes() if route.path != "/info"),
            web.get("/version", self._version),
            web.post("/start_profile", self._profile),
            web.post("/stop_profile", self._profile),
        ]

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": self.world.version})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "tiny", "object": "model", "owned_by": "vllm"}]})

    async def _profile(self, request: web.Request) -> web.Response:
        if not self.profiles:
            return web.json_response({"detail": "Not Found"}, status=404)
        self.profiled.append((request.path, request.headers.get("authorization")))
        return web.Response()

    async def answer(self, request: web.Request, call: Call) -> web.StreamResponse:
        try:
            if self.dead:
                raise Dead
            extra = await self.work(call)
        except Dead:
            return self.die()
        except Failed as error:
            if call.body.get("stream") and error.status >= 500:  # by then the status has been sent
                return await self._told(request, call, error)
            return web.json_response(error.body(), status=error.status)
        if call.body.get("stream"):
            return await self._stream(request, call)
        return web.json_response(await self.reply(call) | extra)

    async def work(self, call: Call) -> dict[str, Any]:
        """What happens before the first token; the answer's fields beside it. Raises Failed."""
        raise NotImplementedError

    async def _told(self, request: web.Request, call: Call, error: Failed) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        frames = [self._events(call)[0], b"data: " + json.dumps(error.body()).encode() + b"\n\n", b"data: [DONE]\n\n"]
        for frame in frames:
            await response.write(frame)
        return response

    def die(self) -> web.Response:
        """The engine core is gone: every request gets an error, and the server ends."""
        self.dead = True
        self._ending = asyncio.get_running_loop().create_task(self._end())
        return web.json_response(Failed(500, "EngineDeadError").body(), status=500)

    async def _end(self) -> None:
        await asyncio.sleep(0.01)
        await self.stop()

    # ---- items

    def key(self, part: Mapping[str, Any], body: Mapping[str, Any]) -> str:
        factors = {name: body[name] for name in ("mm_processor_kwargs", "media_io_kwargs") if body.get(name)}
        if factors and not self.world.trusts_kwargs:
            raise Failed(400, "mm_processor_kwargs need --trust-request-mm-kwargs")
        uuid = part.get("uuid")
        if uuid is not None and not factors:
            return str(uuid)
        media = {name: value for name, value in part.items() if name in MEDIA}
        return blake3(json.dumps([body.get("model"), uuid or media, factors], sort_keys=True).encode()).hexdigest()

    def encode(self, part: Mapping[str, Any], key: str) -> None:
        """Raises Failed for what is no image, or nowhere."""
        value = part.get("image_url")
        url = value.get("url") if isinstance(value, dict) else value
        if url is not None and url.startswith("http://nowhere.example"):
            raise Failed(500, "Cannot connect to host nowhere.example")
        if url is not None and url.startswith("data:"):
            data = base64.b64decode(url.partition(",")[2])
            if not data.startswith((b"\x89PNG", b"\xff\xd8")):
                raise Failed(400, "cannot identify image file")
        self.encoded.append(key)


class Encoder(Vllm):
    role = "encode"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.cache: set[str] = set()
        self.pieces = ()

    async def start(self) -> None:
        self.cache = set()
        await super().start()

    async def work(self, call: Call) -> dict[str, Any]:
        entries: dict[str, dict[str, Any]] = {}
        for index, part in enumerate(media_of(call.body)):
            key = self.key(part, call.body)
            if key not in self.cache:
                self.encode(part, key)
                self.cache.add(key)
                if self.world.ec == "example":
                    self.world.files.add(key)
            modality = MODALITIES[part["type"]]
            entry = entries.setdefault(key, {"item_indices": [], "metadata": metadata_of(key, modality)})
            if self.world.version >= "0.33":
                entry["modality"] = modality
            if self.world.ec == "mooncake":
                told = call.body["ec_transfer_params"]
                entry["transfer_id"] = told["ec_items"][index]["transfer_id"]
                if not self.world.loses:
                    self.world.pushed.add((told["consumer_zmq"], entry["transfer_id"]))
            entry["item_indices"].append(index)
        return {"ec_transfer_params": entries or None} if self.world.reports else {}


class Combined(Vllm):
    """Prefills and decodes; it has an encoder of its own unless it is started with `--language-model-only`."""

    language_only = False

    @property
    def ec_port(self) -> int:
        """Where embeddings are pushed to; nobody listens, the World knows."""
        return self.port

    @property
    def ports(self) -> dict[str, int]:
        """What a list of engines has to say of it."""
        return {"ec_port": self.ec_port} if self.world.ec == "mooncake" else {}

    @property
    def url(self) -> str:
        query = "&".join(f"{name}={port}" for name, port in self.ports.items())
        return f"http://{self.netloc}{'?' if query else ''}{query}"

    async def work(self, call: Call) -> dict[str, Any]:
        self.take(call, [])
        return {}

    def take(self, call: Call, own: list[tuple[str, str]]) -> None:
        """Every item's embedding, from where it can be had. Raises Failed."""
        self.seen.append(own)
        for part in media_of(call.body):
            key, modality = self.key(part, call.body), str(part["type"]).partition("_embeds")[0]
            if modality == part["type"]:
                own.append((key, self._of_media(call, part, key)))
            elif not self.world.reports:
                raise Failed(400, "You must set `--enable-mm-embeds` to input embeddings")
            elif self._has(call, key):
                own.append((key, "fetched"))
            elif self.world.ec == "example":
                raise Dead
            else:
                raise Failed(500, "Internal server error")

    def _has(self, call: Call, key: str) -> bool:
        if self.world.ec == "example":
            return key in self.world.files
        told = call.body.get("ec_transfer_params") or {}
        ids = [item["transfer_id"] for item in told.get("ec_items", ()) if item["mm_hash"] == key]
        return any((f"tcp://127.0.0.1:{self.ec_port}", transfer_id) in self.world.pushed for transfer_id in ids)

    def _of_media(self, call: Call, part: Mapping[str, Any], key: str) -> str:
        if self.language_only:
            raise Failed(400, "At most 0 image(s) may be provided in one prompt.")
        if self._has(call, key):
            return "fetched"
        self.encode(part, key)
        return "encoded"


class Prefill(Combined):
    role = "prefill"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.stops = False  # its first token is the end, unless `min_tokens` forbids it
        self.engine_ids = {"0": f"engine-{id(self)}"}
        self._bootstrap: web.AppRunner | None = None
        self.bootstrap_port = 0

    async def start(self) -> None:
        await super().start()
        if self.world.kv == "mooncake":
            app = web.Application()
            app.router.add_get("/query", self._query)
            self._bootstrap = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            await self._bootstrap.setup()
            await web.TCPSite(self._bootstrap, "127.0.0.1", self.bootstrap_port, reuse_address=True).start()
            self.bootstrap_port = self._bootstrap.addresses[0][1]

    async def stop(self) -> None:
        await super().stop()
        if self._bootstrap is not None:
            runner, self._bootstrap = self._bootstrap, None
            await runner.cleanup()

    @property
    def ports(self) -> dict[str, int]:
        bootstrap = {"bootstrap_port": self.bootstrap_port} if self.world.kv == "mooncake" else {}
        return super().ports | bootstrap

    async def _query(self, request: web.Request) -> web.Response:
        return web.json_response({rank: {"engine_id": name} for rank, name in self.engine_ids.items()})

    async def work(self, call: Call) -> dict[str, Any]:
        asked = call.body.get("kv_transfer_params") or {}
        self.take(call, [])
        stopped = self.stops and call.body.get("min_tokens") != 1
        if not asked.get("do_remote_decode"):
            return {}
        if self.world.kv == "nixl":
            name = f"chatcmpl-{call.id}-be5e67b4"
            self.world.prefilled.add(name)
            handoff = {"do_remote_prefill": True, "do_remote_decode": False, "remote_request_id": name}
            where = {"remote_block_ids": [[1]], "remote_engine_id": "c1", "remote_host": "127.0.0.1", "remote_port": 1}
            return {"kv_transfer_params": None if call.body.get("stream") else handoff | where}
        if self.world.kv == "example":
            self.world.prefilled.add(prompt_of(call))
        elif not stopped:
            self.world.transfer(asked["transfer_id"]).set()
        return {"kv_transfer_params": None}


class Decode(Combined):
    role = "decode"

    @property
    def ports(self) -> dict[str, int]:
        return {}

    async def work(self, call: Call) -> dict[str, Any]:
        told = call.body.get("kv_transfer_params") or {}
        if not told.get("do_remote_prefill"):
            self.take(call, [])
        elif "transfer_id" in told:
            assert told["remote_bootstrap_addr"].startswith("http://") and told["remote_engine_id"]
            await self.world.transfer(told["transfer_id"]).wait()
            self._received(call)
        elif told.get("remote_request_id") not in self.world.prefilled:
            raise Failed(500, "Internal server error")
        else:
            self._received(call)
        return {}

    def _received(self, call: Call) -> None:
        self.seen.append([(self.key(part, call.body), "received") for part in media_of(call.body)])


def media_of(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of a chat that are items, media or metadata."""
    messages = body.get("messages") or ()
    parts = [p for m in messages if isinstance(m["content"], list) for p in m["content"]]
    return [p for p in parts if p["type"] in MEDIA or p["type"].endswith("_embeds")]


def metadata_of(key: str, modality: str) -> dict[str, Any]:
    if modality == "audio":
        return {"audio_num_tokens": 7}
    return {f"{modality}_grid_thw": [1, 2 * len(key) % 14 + 2, 8]}


def prompt_of(call: Call) -> str:
    return json.dumps(call.body.get("messages") or call.body.get("prompt"), sort_keys=True)
