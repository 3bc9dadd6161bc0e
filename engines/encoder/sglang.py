"""SGLang's encoder protocol (`zmq_to_scheduler`), so that its language-only servers can list this encoder as theirs.

    POST /encode {req_id, mm_items, part_idx, num_parts …}   encode; answered when the embedding has been pushed
    POST /scheduler_receive_url {req_id, receive_url …}      where it is awaited, by each rank; before or after
    POST /scheduler_receive_meta_data {req_id, part_idx}     its size, once it is there

Embeddings leave over ZMQ: the metadata, and the rows of all items of the part. An error leaves as metadata alone, since
a server of 0.5.10 reads nothing else. Whose words are meant is told from the call: 0.5.23 names the encoder's own URL.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import zmq
import zmq.asyncio
from aiohttp import web

from engines.dtypes import named
from engines.encoder.cache import Entry
from engines.encoder.pickles import embedding_data, modality
from engines.encoder.request import Embedding, MediaItem
from engines.encoder.service import Encoder
from engines.errors import BadRequest, DeadlineExceeded, EngineError
from engines.http import json_response, read_json
from engines.transfer.tasks import Tasks

log = logging.getLogger(__name__)

EncodeAll = Callable[[Sequence[MediaItem], list[Entry]], Awaitable[None]]
"""Fills the list with pinned entries in the order of the items. Raises EngineError."""


@dataclass(slots=True)
class Part:
    """What is known of one part: who waits for it, and how large it is."""

    born: float
    receivers: set[str] = field(default_factory=set)
    complete: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    size: Mapping[str, int] | None = None  # None at its end: it failed


class SglangProtocol:
    """`timeout`: seconds that an embedding waits for its receivers, and they for it."""

    def __init__(self, encoder: Encoder, encode: EncodeAll, timeout: float) -> None:
        self._encoder = encoder
        self._encode = encode
        self._timeout = timeout
        self._parts: dict[str, Part] = {}
        self._context = zmq.asyncio.Context()
        self._tasks = Tasks()

    async def close(self) -> None:
        await self._tasks.close()
        self._context.destroy(linger=0)

    def routes(self) -> Iterable[web.RouteDef]:
        yield web.post("/encode", self.encode)
        yield web.post("/scheduler_receive_url", self.receive_url)
        yield web.post("/scheduler_receive_meta_data", self.size)

    # ---- routes

    async def encode(self, request: web.Request) -> web.Response:
        body = await read_json(request)
        try:
            items = parse(body)
        except EngineError as error:
            return _failed(body, error)
        part = self._part(body["req_id"])
        entries: list[Entry] = []
        try:
            await self._encode(items, entries)
            rows = b"".join(self._encoder.read(entry) for entry in entries)
            embeddings: list[Embedding] = [entry.value for entry in entries]
        except EngineError as error:
            part.ended.set()
            self._tasks.spawn(self._push(body, part, [metadata(body, error=error)]))
            return _failed(body, error)
        finally:
            for entry in entries:
                self._encoder.release(entry)
        tokens, width = sum(found.tokens for found in embeddings), embeddings[0].shape[1]
        part.size = {"embedding_size": len(rows), "embedding_len": tokens, "embedding_dim": width}
        part.ended.set()
        try:
            await self._push(body, part, [metadata(body, embeddings), rows])
        except EngineError as error:
            return _failed(body, error)
        return json_response(None)

    async def receive_url(self, request: web.Request) -> web.Response:
        body = await read_json(request)
        url, count = body.get("receive_url"), body.get("receive_count")
        if not isinstance(body.get("req_id"), str) or not isinstance(url, str) or not isinstance(count, int):
            return _failed(body, BadRequest("req_id, receive_url and receive_count are needed"))
        part = self._part(body["req_id"])
        part.receivers.add(url)
        if len(part.receivers) >= count:
            part.complete.set()
        return json_response(None)

    async def size(self, request: web.Request) -> web.Response:
        body = await read_json(request)
        part = self._part(str(body.get("req_id")))
        try:
            async with asyncio.timeout(self._timeout):
                await part.ended.wait()
        except TimeoutError:
            return _failed(body, DeadlineExceeded("the part was not encoded in time", code="encode_timeout"))
        if part.size is None:
            return _failed(body, EngineError("the part could not be encoded", code="encode_failed"))
        return json_response({"req_id": body["req_id"], "part_idx": body.get("part_idx"), **part.size})

    # ---- parts

    def _part(self, req_id: str) -> Part:
        now = asyncio.get_running_loop().time()
        for name in [name for name, part in self._parts.items() if part.born < now - 2 * self._timeout]:
            del self._parts[name]  # half of it never came
        return self._parts.setdefault(req_id, Part(now))

    async def _push(self, body: Mapping[str, Any], part: Part, frames: Sequence[bytes]) -> None:
        """To every receiver, once all have registered or stand in the body. Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout(self._timeout), asyncio.TaskGroup() as group:
                for address in await _receivers(body, part):
                    group.create_task(self._send(address, frames))
        except TimeoutError:
            raise DeadlineExceeded("no receiver took the embedding in time", code="push_timeout") from None
        finally:
            self._parts.pop(body["req_id"], None)

    async def _send(self, address: str, frames: Sequence[bytes]) -> None:
        with self._context.socket(zmq.PUSH) as sock:
            sock.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a receiver that is not there
            sock.setsockopt(zmq.LINGER, int(self._timeout * 1000))
            sock.connect(f"tcp://{address}")
            await sock.send_multipart(frames)


async def _receivers(body: Mapping[str, Any], part: Part) -> Iterable[str]:
    ports = body.get("embedding_port")
    if ports is None:
        await part.complete.wait()
        return part.receivers
    return [f"{body['prefill_host']}:{port}" for port in (ports if isinstance(ports, list) else [ports])]


# ---- words


def parse(body: Mapping[str, Any]) -> list[MediaItem]:
    """The items of a part, in order. Raises BadRequest."""
    items, index, count = body.get("mm_items"), body.get("part_idx"), body.get("num_parts")
    if not isinstance(body.get("req_id"), str):
        raise BadRequest("missing or invalid req_id", param="req_id")
    if type(index) is not int or type(count) is not int or not 0 <= index < count:
        raise BadRequest("part_idx must be in [0, num_parts)", param="part_idx")
    modality = str(body.get("modality", "IMAGE")).lower()
    if modality not in ("image", "video"):
        told = "this encoder takes images and videos only: none of its models has audio"
        raise BadRequest(told, param="modality", code="unsupported_modality")
    if not isinstance(items, list) or not items:
        raise BadRequest("missing or empty mm_items", param="mm_items")
    return [MediaItem(n, f"mm_items[{n}]", _url(n, item), modality=modality) for n, item in enumerate(items)]


def _url(number: int, item: object) -> str:
    url = item.get("url") if isinstance(item, dict) else item
    if not isinstance(url, str) or not url:
        raise BadRequest("an item is a string, or an object with a `url`", param=f"mm_items[{number}]")
    if "://" in url or url.startswith("data:"):
        return url
    return f"data:;base64,{url}"


def metadata(body: Mapping[str, Any], embeddings: Sequence[Embedding] = (), error: EngineError | None = None) -> bytes:
    """The first frame: what SGLang's encoders say of a part whose items have these embeddings, or failed."""
    fields: dict[str, Any] = {
        "req_id": body["req_id"],
        "num_parts": body["num_parts"],
        "part_idx": body["part_idx"],
        "grid_dim": torch.tensor([found.grid for found in embeddings], dtype=torch.long) if embeddings else None,
        "modality": modality(str(body.get("modality", "IMAGE"))),
        "embedding": None,
        "send_time": None,
        "dtype": named(embeddings[0].dtype) if embeddings else None,
        "shape": [sum(e.tokens for e in embeddings), embeddings[0].shape[1]] if embeddings else None,
        "error_msg": None if error is None else error.message,
        "error_code": None if error is None else error.status,
    }
    clips = [found.clip for found in embeddings if found.clip is not None]
    if clips:  # one entry for each video; of the two a server reads what its model asks for
        fields["video_timestamps"] = [list(clip.timestamps) for clip in clips]
        fields["second_per_grid_ts"] = [clip.spacing for clip in clips]
    return embedding_data(fields, new="encoder_url" in body)


def _failed(body: Mapping[str, Any], error: EngineError) -> web.Response:
    said = {"status": "error", "message": error.message, "req_id": body.get("req_id")}
    return json_response(said, status=error.status)
