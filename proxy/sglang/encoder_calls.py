"""One item at one real SGLang encoder: the call that encodes, and in time the word of where its receivers wait.

Chooses no encoder and tries nothing twice: see `virtual_encoder`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from proxy.core import Instance, Leg, Stage
from proxy.errors import ProxyError, Refused
from proxy.legs import Legs
from proxy.lessons import ahead
from proxy.media import splice
from proxy.record import Record
from proxy.sglang.pieces import Piece
from proxy.tasks import together
from proxy.upstream import Upstream

_ENCODE, _RECEIVER, _SIZES = "/encode", "/scheduler_receive_url", "/scheduler_receive_meta_data"
_READ_S = 30.0  # for an encoder to say that it has read the media; then its receivers are told to it all the same
_VERDICT_S = 0.2  # for /encode to answer where another call failed: its answer says why


@dataclass(slots=True, eq=False)
class Receivers:
    """Where the embeddings of one request go, as they register. Each rank of a server is one."""

    known: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # by address: what registered it
    complete: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, body: Mapping[str, Any]) -> None:
        """`body`: of POST /scheduler_receive_url."""
        self.known[body["receive_url"]] = body
        if len(self.known) >= body["receive_count"]:
            self.complete.set()


@dataclass(slots=True, eq=False)
class Call:
    """`told`: the encoder knows a receiver, and pushes its errors there too."""

    leg: Leg
    piece: Piece
    number: int  # of the attempts for this item, from 1
    record: Record = field(default_factory=Record)  # of the client's request; of nobody's, if it is none of ours
    told: bool = False

    @property
    def instance(self) -> Instance:
        return self.leg.instance

    @property
    def req_id(self) -> str:
        """An encoder keeps what failed under its name until somebody fetches it: each attempt has its own. Receivers
        look at what stands before the part's number, and at `part_idx`."""
        name = str(self.piece.body["req_id"])
        return name if self.number == 1 else f"{name}-{self.number}"

    @property
    def body(self) -> Mapping[str, Any]:
        """0.5.23 puts in the encoder's own URL."""
        body = {**self.piece.body, "req_id": self.req_id}
        return {**body, "encoder_url": self.instance.url} if "encoder_url" in body else body


class EncoderCalls:
    def __init__(self, legs: Legs, upstream: Upstream) -> None:
        self._legs = legs
        self._upstream = upstream
        self._silent: set[str] = set()  # encoders that cannot tell when they have read the media: before 0.5.19

    async def run(self, call: Call, receivers: Receivers | None) -> bytes:
        """The answer of /encode, which comes when the embedding has been pushed. Raises ProxyError.

        `receivers`: None where they are in the body, or fetch by RDMA.
        """
        began, before = self._legs.clock(), ahead(call.leg)
        with self._legs.judged(call.leg, call.record) as part:
            part.attempt = call.number
            async with together() as group:
                if receivers is None:
                    call.told = True
                else:
                    register = group.create_task(self._register(call, receivers))
                answer = await self.post(call.instance, _ENCODE, call.body)
                if receivers is not None:
                    register.cancel()
        self._legs.lessons.encoded(call.leg, {}, before, self._legs.clock() - began)
        return answer

    async def introduce(self, call: Call, receivers: Receivers) -> None:
        """Tell the encoder of a failed call where its receivers are, so that it pushes its error there."""
        async with together() as group:
            for body in receivers.known.values():
                group.create_task(self.post(call.instance, _RECEIVER, {**body, "req_id": call.req_id}))

    async def post(self, instance: Instance, path: str, body: Mapping[str, Any]) -> bytes:
        """Raises EngineFailed."""
        data = splice.dumps(body)
        async with self._upstream.post(instance, Stage.ENCODE, path, data, "", self._legs.timeouts.encode) as answer:
            return await answer.read()

    async def _register(self, call: Call, receivers: Receivers) -> None:
        try:
            await self._read(call)
            await receivers.complete.wait()
            call.told = True
            await self.introduce(call, receivers)
        except ProxyError:
            await asyncio.sleep(_VERDICT_S)
            raise

    async def _read(self, call: Call) -> None:
        """Until the encoder has read the media. If it cannot, this waits: /encode says why."""
        if call.instance.url in self._silent:
            return
        asked = {"req_id": call.req_id, "part_idx": call.piece.body["part_idx"]}
        try:
            async with asyncio.timeout(_READ_S):
                await self.post(call.instance, _SIZES, asked)
        except TimeoutError:
            pass
        except Refused as error:
            if error.status not in (404, 405):
                await asyncio.Event().wait()
            self._silent.add(call.instance.url)
