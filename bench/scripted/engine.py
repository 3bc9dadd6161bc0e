"""A scripted engine of any role: says the tokens that its request asks for, at a fixed pace, and fails when told to.

It speaks what our engines speak (push and pull), and what engines of other families say to their proxies. An engine
runs in this process, or in one of its own (`python -m bench.scripted`), where `GET /scripted` tells its counters and
`POST /scripted` sets its pace.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import orjson

from bench.scripted import answers, faults
from bench.scripted.client import Client, Ending
from bench.scripted.faults import Fault
from bench.scripted.server import Connection, Request

ROLES = ("encode", "prefill", "decode", "both")
FAMILIES = ("native", "vllm", "ascend", "sglang")
_ASK_TIMEOUT_S = 30.0
_ROOM_TIMEOUT_S = 1.0  # for the prefill of a room; SGLang's own default is minutes


@dataclass(slots=True)
class Pace:
    """Seconds: before an answer begins, and between two tokens of a stream."""

    delay: float = 0.0
    interval: float = 0.0


@dataclass(slots=True)
class Counters:
    calls: int = 0  # generation calls so far
    running: int = 0  # callers that wait for an answer now
    left: int = 0  # callers that left before the end of theirs
    failed: int = 0  # calls answered by a fault
    resident: int = 0  # connections open now
    received: int = 0  # bytes of the bodies of generation calls


class Rooms:
    """The bootstrap rooms that prefill engines have filled: in SGLang's wire, decode waits for its room."""

    def __init__(self) -> None:
        self._rooms: dict[int, asyncio.Event] = {}

    def fill(self, room: int) -> None:
        self._rooms.setdefault(room, asyncio.Event()).set()

    async def filled(self, room: int, timeout: float) -> bool:
        try:
            async with asyncio.timeout(timeout):
                await self._rooms.setdefault(room, asyncio.Event()).wait()
        except TimeoutError:
            return False
        return True


class Engine:
    """`async with` starts and stops it. `fault` fails every generation call until it is None again."""

    def __init__(
        self,
        role: str,
        pace: Pace | None = None,
        *,
        port: int = 0,
        rooms: Rooms | None = None,
        family: str = "native",
    ) -> None:
        self.role = role
        self.family = family
        self.port = port
        self.pace = pace or Pace()
        self.counters = Counters()
        self.fault: Fault | None = None
        self.left_at: list[float] = []  # loop times at which callers left
        self.rooms = rooms
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self._callbacks: dict[str, list[Client]] = {}  # idle connections to metaservers
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Engine {self.role} {self.url} {self.counters} fault={self.fault}>"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connected, "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for connection in list(self._connections):
            connection.reset()
        for client in itertools.chain.from_iterable(self._callbacks.values()):
            client.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _connected(self) -> Connection:
        connection = Connection(self._handle, self._disconnected)
        self._connections.add(connection)
        return connection

    def _disconnected(self, connection: Connection) -> None:
        self._connections.discard(connection)

    # ---- routes

    def _handle(self, request: Request, connection: Connection) -> None:
        if request.path == "/scripted":
            self._script(request, connection)
        elif request.method == "POST":
            self._generate(request, connection)
        elif request.path == "/info" and self.family == "native":
            info = {"engine": "triptych", "version": "0", "role": self.role, "model": answers.MODEL}
            connection.respond(200, info)
        elif request.path == "/v1/models":
            connection.respond(200, {"object": "list", "data": [{"id": answers.MODEL, "object": "model"}]})
        else:  # what routers ask of an engine: its health, its facts
            connection.respond(200, {"status": "ok", "model_path": answers.MODEL, "served_model_name": answers.MODEL})

    def _script(self, request: Request, connection: Connection) -> None:
        if request.method == "POST":
            self.pace = Pace(**orjson.loads(request.body))
        self.counters.resident = len(self._connections)
        connection.respond(200, asdict(self.counters))

    def _generate(self, request: Request, connection: Connection) -> None:
        call = Call(self, request, connection)
        connection.left = call.left
        if self.pace.delay:
            asyncio.get_running_loop().call_later(self.pace.delay, call.answer)
        else:
            call.answer()

    # ---- what decode does before it answers

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)  # kept in _tasks, awaited in __aexit__
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def ask(self, url: str, request_id: str) -> tuple[int, bytes]:
        """Ask a metaserver for the prefill of a request: its status and answer; 504 where it gave none."""
        descriptor = {
            "token_ids": [],
            "request_id": f"chatcmpl-{request_id}",
            "do_remote_prefill": False,
            "do_remote_decode": True,
            "remote_block_ids": [[1, 2, 3, 4]],
            "remote_block_size": [16],
            "remote_engine_id": "scripted",
            "remote_host": "127.0.0.1",
            "remote_port": self.port,
            "remote_tp_size": 1,
            "remote_cached_tokens": 0,
            "offer": {"ticket": request_id},
        }
        base, slash, path = url.rpartition("/v1/")
        idle = self._callbacks.setdefault(base, [])
        client = idle.pop() if idle else Client(base)
        answer = await client.post(slash + path, orjson.dumps(descriptor), timeout=_ASK_TIMEOUT_S)
        idle.append(client)
        if answer.ending is not Ending.COMPLETE:
            return 504, orjson.dumps(answers.error("the metaserver did not answer", 504))
        return answer.status, answer.body


class Call:
    """One generation call, from its request to the last byte of its answer."""

    def __init__(self, engine: Engine, request: Request, connection: Connection) -> None:
        self._engine = engine
        self._connection = connection
        self._gone = False
        self._tag = answers.tag_of(request.body)
        self._id = request.headers.get("x-request-id") or f"{random.getrandbits(64):x}"
        self._body = answers.parse(request.body)
        engine.counters.calls += 1
        engine.counters.running += 1
        engine.counters.received += len(request.body)

    def left(self) -> None:
        """The caller went away."""
        self._gone = True
        self._engine.counters.running -= 1
        self._engine.counters.left += 1
        self._engine.left_at.append(asyncio.get_running_loop().time())

    def answer(self) -> None:
        """Answer at once, or once the prefill is there; or fail."""
        engine = self._engine
        if self._gone:
            return
        if engine.fault is not None:
            self._fail(engine.fault)
            return
        params = self._body.get("kv_transfer_params") or {}
        room = self._body.get("bootstrap_room")
        if engine.role == "decode" and isinstance(url := params.get("metaserver"), str):
            engine.spawn(self._after_prefill(url))
        elif engine.role == "decode" and engine.rooms is not None and isinstance(room, int):
            engine.spawn(self._after_room(engine.rooms, room))
        else:
            if engine.rooms is not None and isinstance(room, int):
                engine.rooms.fill(room)
            self._say()

    async def _after_prefill(self, url: str) -> None:
        status, body = await self._engine.ask(url, self._id)
        if self._gone:
            return
        if status == 200:
            self._say()
        else:
            self._respond(status, body)

    async def _after_room(self, rooms: Rooms, room: int) -> None:
        prefilled = await rooms.filled(room, _ROOM_TIMEOUT_S)
        if self._gone:
            return
        if prefilled:
            self._say()
        else:
            self._respond(500, answers.error("no KV came for this room", 500))

    # ---- answers

    @property
    def _streamed(self) -> bool:
        return self._body.get("stream") is True and self._engine.role != "encode"

    @property
    def _tokens(self) -> int:
        asked = self._body.get("max_completion_tokens") or self._body.get("max_tokens") or 1
        return 1 if self._engine.role == "prefill" else int(asked)

    def _say(self) -> None:
        if not self._body:
            self._respond(400, answers.error("the body is no JSON object", 400))
        elif (problem := self._problem()) is not None:
            self._respond(400, answers.error(problem, 400))
        elif self._streamed:
            self._stream(answers.events(self._id, self._tag, self._tokens))
        else:
            self._respond(200, self._whole())

    def _problem(self) -> str | None:
        """A native prefill must hold an embedding for each item it is told of."""
        if self._engine.role not in ("prefill", "both"):
            return None
        entries = self._body.get("ec_transfer_params") or {}
        uuids = [part.get("uuid") for part in parts(self._body) if part.get("type") == "image_embeds"]
        missing = [uuid for uuid in uuids if uuid not in entries]
        return f"no embedding for {missing[0]}" if missing else None

    def _whole(self) -> dict[str, Any]:
        if self._engine.role == "encode":
            answer = answers.whole(self._id, "", 0)
            return answer if self._engine.family == "ascend" else answer | {"ec_transfer_params": self._entries()}
        answer = answers.whole(self._id, answers.text(self._tag, self._tokens), self._tokens)
        params = self._body.get("kv_transfer_params")
        if self._engine.role == "prefill" and isinstance(params, dict) and params.get("do_remote_decode"):
            answer["kv_transfer_params"] = None if params.get("remote_block_ids") else self._handoff()
        return answer

    def _handoff(self) -> dict[str, Any]:
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [[1, 2, 3, 4]],
            "remote_engine_id": "scripted",
            "remote_request_id": f"chatcmpl-{self._id}",
            "remote_host": "127.0.0.1",
            "remote_port": self._engine.port,
            "remote_num_tokens": 64,
            "tp_size": 1,
        }

    def _entries(self) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for index, part in enumerate(parts(self._body)):
            fresh = {"item_indices": [], "metadata": {"image_grid_thw": [1, 56, 72]}} | self._whereabouts()
            entries.setdefault(str(part.get("uuid")), fresh)["item_indices"].append(index)
        return entries

    def _whereabouts(self) -> dict[str, Any]:
        """What only our own encoders tell of an embedding."""
        if self._engine.family != "native":
            return {}
        return {
            "modality": "image",
            "num_tokens": 1008,
            "dtype": "bfloat16",
            "shape": [1008, 4096],
            "where": {"host": "127.0.0.1", "port": self._engine.port, "key": self._id},
        }

    def _respond(self, status: int, body: object) -> None:
        self._engine.counters.running -= 1
        self._connection.left = None
        self._connection.respond(status, body)

    def _fail(self, fault: Fault) -> None:
        engine = self._engine
        engine.counters.failed += 1
        if fault not in (Fault.HANG, Fault.STALL):
            engine.counters.running -= 1
            self._connection.left = None
        streamed = list(answers.events(self._id, self._tag, self._tokens)) if self._streamed else []
        faults.fail(fault, self._connection, streamed, self._whole())

    def _stream(self, events: Iterator[bytes]) -> None:
        self._connection.begin()
        if self._engine.pace.interval:
            loop = asyncio.get_running_loop()
            self._tick(loop, next(events), events, loop.time())
            return
        for event in events:
            self._connection.write(event)
        self._end()

    def _tick(self, loop: asyncio.AbstractEventLoop, event: bytes, events: Iterator[bytes], at: float) -> None:
        """Say one token and set the clock for the next; the pace does not drift, and the end comes with the last."""
        if self._gone:
            return
        self._connection.write(event)
        following = next(events, None)
        if following is None:
            self._end()
            return
        at += self._engine.pace.interval
        loop.call_at(at, self._tick, loop, following, events, at)

    def _end(self) -> None:
        self._engine.counters.running -= 1
        self._connection.left = None
        self._connection.end()


def parts(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The media parts of a request, in reading order."""
    contents = [message.get("content") for message in body.get("messages") or ()]
    listed = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in listed if part.get("type") != "text"]
