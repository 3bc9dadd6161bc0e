"""All encoders of an SGLang fleet as one: language servers call it as they would call an encoder, by SGLang's protocol.

    language server ──/encode──────────────▶ here ──/encode, one item each──▶ real encoders, by our policy
                    ──/scheduler_receive_url▶ here ──the same────────────────▶ whoever encodes for it
                    ◀═══════════ embeddings, by ZMQ or RDMA, straight from each real encoder

No embedding passes through here and nothing is unpickled. A language server of 0.5.23 dies of every failure while it
waits for an embedding, and of a caller that hangs up meanwhile: both abort a request that has no input ids yet. Hence:

- Where a receiver waits is told to an encoder only once that has read the media (0.5.23 says so before its forward),
  because with the address it would push its error there. Until then a failed item goes elsewhere unseen.
- An item that no encoder can read fails our client's request, and the server gets the embedding of a black picture.
- `wards` keep a server's connection, though its client has left or been told, until the embeddings are there.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import orjson

from proxy.balancer.fleet import Fleet
from proxy.core import Job, Plan, Role, Stage
from proxy.dialects.sglang import SELF_FED, Sglang
from proxy.errors import BadRequest, Conflict, NoInstance, NotFound, ProxyError, Refused
from proxy.http.message import JSON, Data, Response, json_response
from proxy.http.router import Route, get, post
from proxy.http.server import Request
from proxy.legs import Legs
from proxy.media.costs import Costs
from proxy.planning.plan import Holds, Planner, family_of
from proxy.record import Record
from proxy.relay import Sink
from proxy.retry import Cause, cause, rule
from proxy.sglang import pieces
from proxy.sglang.encoder_calls import Call, EncoderCalls, Receivers
from proxy.sglang.pieces import Part, Piece
from proxy.sglang.wards import PATIENCE_S, Wards, Work
from proxy.tasks import together
from proxy.telemetry.redaction import redacted

log = logging.getLogger(__name__)

_LARGE = 1 << 18  # bytes; reading more than this takes a millisecond and leaves the loop
_SIBLINGS_S = 0.25  # for the other modalities of a request to arrive: one server sends them at once
_AGAIN_S = 0.5  # between two looks for an encoder


@dataclass(slots=True, eq=False)
class Gathered:
    """What has arrived of one request of a language server."""

    born: float
    parts: dict[int, Part] = field(default_factory=dict)
    calls: int = 0  # of POST /encode that run
    complete: asyncio.Event = field(default_factory=asyncio.Event)
    receivers: Receivers = field(default_factory=Receivers)
    holders: dict[str, Call] = field(default_factory=dict)  # by part, in RDMA: who has its embedding
    attempts: Counter[int] = field(default_factory=Counter)  # by item

    def add(self, part: Part) -> None:
        """Raises Conflict."""
        if part.index in self.parts:
            raise Conflict(f"part {part.index} of {part.rid} is being encoded already", param="req_id")
        self.parts[part.index] = part
        if len(self.parts) == part.count:
            self.complete.set()


class VirtualEncoder:
    """`attempts`: at the most, per item."""

    def __init__(
        self, fleet: Fleet, planner: Planner, legs: Legs, calls: EncoderCalls, attempts: int, costs: Costs
    ) -> None:
        self._fleet = fleet
        self._planner = planner
        self._clock = legs.clock
        self._metrics = legs.metrics
        self._calls = calls
        self._attempts = attempts
        self._costs = costs
        self._gathered: dict[str, Gathered] = {}  # by rid
        self.wards = Wards()

    def __repr__(self) -> str:
        return f"<VirtualEncoder {len(self._gathered)} requests, {len(self.wards)} of ours>"

    def go_by(self, planner: Planner, calls: EncoderCalls, attempts: int) -> None:
        """Plan and call by these from now on."""
        self._planner, self._calls, self._attempts = planner, calls, attempts

    def routes(self) -> list[Route]:
        return [
            post("/encode", self.encode),
            post("/scheduler_receive_url", self.receive_url),
            post("/scheduler_receive_meta_data", self.relay),
            post("/send", self.relay),
            get("/health", self.health),
            get("/health_generate", self.health),
        ]

    # ---- what language servers call

    async def encode(self, request: Request) -> Response:
        """Answers once every embedding of the part has been pushed, as an encoder does."""
        raw = await request.read()
        req_id = None
        try:
            read = partial(pieces.read, raw, self._costs)
            part = await asyncio.to_thread(read) if len(raw) > _LARGE else read()
            req_id = part.body["req_id"]
            began = self._clock()
            async with self._gathering(part) as gathered:
                content = await self._encode(gathered, part)
            self._metrics.observe("encode", self._clock() - began)
            return json_response(content)
        except ProxyError as error:
            log.warning("%s has no embedding: %s", redacted(str(req_id)), error.told)
            return _failed(error, req_id)

    async def receive_url(self, request: Request) -> Response:
        """Answers at once: a scheduler of 0.5.10 does nothing else until it has the answer."""
        body = _object(await request.read())
        if not _registers(body):
            return _failed(BadRequest("req_id, receive_url and receive_count are needed"), body.get("req_id"))
        self._of(pieces.request_of(body["req_id"])).receivers.add(body)
        return json_response(None)

    async def relay(self, request: Request) -> Response:
        """What follows /encode in RDMA: to whoever has the part."""
        body = _object(await request.read())
        req_id = str(body.get("req_id"))
        gathered = self._gathered.get(pieces.request_of(req_id))
        holder = None if gathered is None else gathered.holders.get(req_id)
        try:
            if holder is None:
                raise NotFound(f"nobody here encodes {req_id!r}", param="req_id")
            asked = {**body, "req_id": holder.req_id}
            return Response(200, await self._calls.post(holder.instance, request.path, asked), {"content-type": JSON})
        except ProxyError as error:
            return _failed(error, req_id)

    async def health(self, request: Request) -> Response:
        """Well while an encoder is: without one, servers had better encode for themselves."""
        return Response(200 if self._encoders() else 503)

    # ---- what the dispatcher says

    async def over(self, plan: Plan, job: Job, sink: Sink, work: Work) -> None:
        """Run `work`, which has a language server serve `job`. Raises what it raises, or why an item has no embedding.

        Whatever ends this early, a client that leaves for one, `work` goes on unseen until its server waits for no
        embedding any more.
        """
        if family_of(plan) != Sglang.name:
            await work(sink)
        elif self._encoders():
            await self.wards.guard(job, sink, work)
        else:
            raise NoInstance("no encode engine is ready", stage=Stage.ENCODE)

    def _encoders(self) -> bool:
        return any(instance.dialect == Sglang.name for instance in self._fleet.ready(Role.ENCODE))

    # ---- one request of a server

    @asynccontextmanager
    async def _gathering(self, part: Part) -> AsyncIterator[Gathered]:
        """Within, `part` belongs to its request. Raises Conflict."""
        gathered = self._of(part.rid)
        gathered.add(part)
        gathered.calls += 1
        ward = self.wards.get(part.rid)
        try:
            with nullcontext() if ward is None else ward.called():
                yield gathered
        finally:
            gathered.calls -= 1
            if not gathered.calls and not gathered.holders:
                self._gathered.pop(part.rid, None)

    def _of(self, request: str) -> Gathered:
        if request not in self._gathered:
            self._sweep()
            self._gathered[request] = Gathered(self._clock())
        return self._gathered[request]

    def _sweep(self) -> None:
        """Forget receivers whose request never came, and embeddings that nobody fetched."""
        oldest = self._clock() - PATIENCE_S
        for name in [n for n, g in self._gathered.items() if g.born < oldest and not g.calls]:
            del self._gathered[name]

    async def _encode(self, gathered: Gathered, part: Part) -> Any:
        """The answer's content: null, or the sizes that RDMA goes on with."""
        if self._by_rdma():
            piece = pieces.whole(part)
            return orjson.loads(await self._piece(gathered, part, piece))
        mine = pieces.cut(gathered.parts.values())[part.index] if await _all_here(gathered) else [pieces.whole(part)]
        async with together() as group:
            for piece in mine:
                group.create_task(self._piece(gathered, part, piece))
        return None

    def _by_rdma(self) -> bool:
        """Servers that fetch by RDMA ask for the size of each of their own parts: those stay as they are."""
        return any(instance.facts.get("encoder_transfer_backend") == "mooncake" for instance in self._fleet)

    # ---- one piece

    async def _piece(self, gathered: Gathered, part: Part, piece: Piece) -> bytes:
        ward = self.wards.get(part.rid)
        try:
            return await self._somewhere(gathered, part, piece)
        except Unembedded as failed:
            blank = piece.blank()
            if failed.pushed or ward is None or blank is None:
                if failed.call is not None and not failed.pushed and isinstance(failed.error, Refused):
                    await self._calls.introduce(failed.call, gathered.receivers)  # 0.5.10 reads no answer but a push
                raise failed.error from None
            ward.fail(piece.index, failed.error)
        return await self._at_last(gathered, part, blank)

    async def _at_last(self, gathered: Gathered, part: Part, piece: Piece) -> bytes:
        """However long it takes until there is an encoder: the server dies of anything else. Raises ProxyError."""
        until = self._clock() + PATIENCE_S
        while True:
            try:
                return await self._somewhere(gathered, part, piece)
            except Unembedded as failed:
                if failed.pushed or self._clock() > until or cause(failed.error) is Cause.CLIENT:
                    raise failed.error from None
            await asyncio.sleep(_AGAIN_S)

    async def _somewhere(self, gathered: Gathered, part: Part, piece: Piece) -> bytes:
        """At an encoder of our choice, and elsewhere where that failed unseen. Raises Unembedded."""
        tried: set[str] = set()
        ward = self.wards.get(part.rid)
        record = Record() if ward is None else ward.job.record
        failed = Unembedded(NoInstance("no encode engine is ready", stage=Stage.ENCODE))
        receivers = gathered.receivers if part.rendezvous and not self._by_rdma() else None
        while len(tried) < self._attempts:
            with Holds() as holds:
                leg = self._planner.encoder((piece.item,), self._clock(), tried, SELF_FED, holds)
                if leg is None:
                    break
                gathered.attempts[piece.index] += 1
                call = Call(leg, piece, gathered.attempts[piece.index], record)
                if self._by_rdma():
                    gathered.holders[piece.body["req_id"]] = call
                if tried:
                    self._metrics.retries.labels(Stage.ENCODE).inc()
                try:
                    return await self._calls.run(call, receivers)
                except ProxyError as error:
                    failed = Unembedded(error, call)
                    if failed.pushed or not rule(error).elsewhere:
                        break
                tried.add(leg.instance.url)
        raise failed


class Unembedded(Exception):
    """No encoder did it; `error` says why the last of them, `call`, did not."""

    def __init__(self, error: ProxyError, call: Call | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.call = call

    @property
    def pushed(self) -> bool:
        """The server knows: the encoder has pushed its error where it would have pushed the embedding."""
        return self.call is not None and self.call.told and isinstance(self.error, Refused)


async def _all_here(gathered: Gathered) -> bool:
    """Whether every part of the request came here, so that all may be numbered anew."""
    try:
        async with asyncio.timeout(_SIBLINGS_S):
            await gathered.complete.wait()
    except TimeoutError:
        return False
    return True


def _object(raw: Data) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        body = None
    return body if isinstance(body, dict) else {}


def _registers(body: Mapping[str, Any]) -> bool:
    kinds = {"req_id": str, "receive_url": str, "receive_count": int}
    return all(type(body.get(name)) is kind for name, kind in kinds.items())


def _failed(error: ProxyError, req_id: str | None) -> Response:
    """An error in an encoder's words."""
    return json_response({"status": "error", "message": error.message, "req_id": req_id}, status=error.status)
