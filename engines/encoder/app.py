"""The encoder's HTTP routes and its assembly. What it does with an item stands in `service`, what it says in
`request`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import torch
from aiohttp import web
from prometheus_client import CollectorRegistry

from engines.devices import devices_of, pinned
from engines.encoder.cache import Entry, State
from engines.encoder.media import MediaReader
from engines.encoder.metrics import Metrics
from engines.encoder.model import Replicas
from engines.encoder.request import MediaItem, answer, parse
from engines.encoder.service import Encoder
from engines.encoder.sglang import SglangProtocol
from engines.errors import DeadlineExceeded, EngineError, SetupError
from engines.http import DONE, check_model, json_response, read_json, request_id, sse
from engines.settings import EncoderSettings
from engines.store.store import opened
from engines.transfer import create
from engines.transfer.base import Transfer, TransferError
from engines.weights import LoadReport


class Places:
    """Where the embeddings of one request are or will be, in the order of its items."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._found: dict[int, tuple[Entry, bool]] = {}
        self._known = asyncio.Event()

    def add(self, index: int, entry: Entry, cached: bool) -> None:
        """See service.Placed."""
        self._found[index] = entry, cached
        if len(self._found) == self._count:
            self._known.set()

    async def known_or(self, encoding: asyncio.Task[None]) -> None:
        """Until all places are known, or `encoding` has ended."""
        encoding.add_done_callback(lambda _: self._known.set())
        await self._known.wait()

    @property
    def promised(self) -> bool:
        """Whether all places are known, and something is still to come there."""
        states = {entry.state for entry, _ in self._found.values()}
        return len(self._found) == self._count and State.FILLING in states

    def ordered(self) -> list[tuple[Entry, bool]]:
        """Entries, and whether each was cached before it was asked for."""
        return [self._found[index] for index in sorted(self._found)]


class EncoderApp:
    """An `engines.http.Engine`."""

    stage = "encode"
    role = "encode"

    def __init__(
        self,
        settings: EncoderSettings,
        encoder: Encoder,
        transfer: Transfer,
        weights: LoadReport,
        vision: Mapping[str, Any],
    ) -> None:
        """`vision`: the numbers of its tower and its processor."""
        self.registry = encoder.metrics.registry
        self._settings = settings
        self.encoder = encoder
        self._transfer = transfer
        self._weights = weights
        self._vision = vision
        self._sglang = SglangProtocol(encoder, self._encode, settings.encode_timeout) if settings.sglang else None

    def routes(self) -> Iterable[web.RouteDef]:
        yield web.post("/v1/chat/completions", self.chat)
        if self._sglang is not None:
            yield from self._sglang.routes()

    async def close(self) -> None:
        if self._sglang is not None:
            await self._sglang.close()

    def info(self) -> Mapping[str, Any]:
        address, store = self._transfer.address, self.encoder.store
        return {
            "transfer": {
                "name": self._transfer.name,
                "host": address.host,
                "port": address.port,
                "nonce": address.nonce,
                "audit": self._transfer.audit(),
            },
            "cache": self.encoder.cache_info(),
            "queue": self.encoder.queue(),
            "weights": {
                "tensors": len(self._weights.names),
                "bytes": self._weights.nbytes,
                "prefixes": list(self._weights.prefixes),
            },
            "vision": self._vision,
            **({} if store is None else {"embedding_store": store.info()}),
        }

    async def check(self) -> None:
        self.encoder.cache.check()

    async def drain(self) -> None:
        """Nothing: handles die with this process, and whoever holds one is told so and asks another encoder."""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await read_json(request)
        check_model(body, self._settings)
        items = parse(body, self._settings.max_items)
        entries: list[Entry] = []
        places = Places(len(items))
        encoding = asyncio.create_task(self._encode(items, entries, places))  # noqa: TID251 - ends here
        try:
            if body.get("announce"):
                await places.known_or(encoding)
                if places.promised:
                    return await self._announced(request, encoding, self._named(items, places))
            await encoding
            return json_response(self._named(items, places))
        finally:
            encoding.cancel()
            encoding.add_done_callback(lambda _: self._release(entries))  # a caller may leave while this waits
            await asyncio.gather(encoding, return_exceptions=True)

    def _release(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self.encoder.release(entry)

    def _named(self, items: Sequence[MediaItem], places: Places) -> dict[str, Any]:
        """The answer, which keeps what it names for its readers: one for each content, however often it is named."""
        found = places.ordered()
        for entry in dict.fromkeys(entry for entry, _ in found):
            self.encoder.named(entry)
        created = int(time.time())  # noqa: TID251 - a date for clients, no interval
        said = [(entry.key, entry.value, cached) for entry, cached in found]
        return answer(request_id(), self._settings.name, created, items, said)

    async def _announced(
        self, request: web.Request, encoding: asyncio.Task[None], reply: Mapping[str, Any]
    ) -> web.StreamResponse:
        """`reply` at once, as an event; and once all embeddings are there, or one has failed, another that says so."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(sse(reply))
        try:
            await encoding
        except EngineError as error:
            await response.write(sse(error.body(self.stage)))
        else:
            await response.write(DONE)
        return response

    async def _encode(self, items: Sequence[MediaItem], entries: list[Entry], places: Places | None = None) -> None:
        """Fill `entries` in the order of the items; on an error too, with those that succeeded. All are pinned."""
        outcomes: dict[int, Entry | EngineError] = {}
        places = places or Places(len(items))

        async def settle(item: MediaItem) -> None:
            try:
                outcomes[item.index] = await self.encoder.encode(item, partial(places.add, item.index))
            except EngineError as error:  # neighbours go on: their embeddings are cached for the next attempt
                self.encoder.metrics.failed(error.code)
                outcomes[item.index] = error.at(item.param)

        try:
            async with asyncio.timeout(self._settings.encode_timeout), asyncio.TaskGroup() as group:
                for item in items:
                    group.create_task(settle(item))
        except TimeoutError:
            seconds = f"{self._settings.encode_timeout:g} s (--encode-timeout)"
            raise DeadlineExceeded(f"not encoded within {seconds}", code="encode_timeout") from None
        finally:
            entries += [outcomes[i] for i in sorted(outcomes) if isinstance(outcomes[i], Entry)]  # type: ignore[misc]
        failures = [outcome for _, outcome in sorted(outcomes.items()) if isinstance(outcome, EngineError)]
        if failures:
            # A failure that no retry can mend says more than one that a retry may.
            raise min(failures, key=lambda error: error.retryable)


@asynccontextmanager
async def build(settings: EncoderSettings) -> AsyncIterator[EncoderApp]:
    """Load the vision tower, open the transfer, and end both. Raises SetupError."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    model, reader = await asyncio.to_thread(_load, settings)
    async with AsyncExitStack() as stack:
        try:
            transfer = _create(settings)
            stack.push_async_callback(transfer.close)
            arena = transfer.allocate("embeddings", int(settings.cache_bytes))
            await transfer.start()
        except (TransferError, OSError) as error:
            raise SetupError(f"--transfer {settings.transfer}: {error}") from None
        stack.enter_context(pinned(arena.buffer, devices_of(settings.device)[0]))
        metrics = Metrics(CollectorRegistry())
        store = await stack.enter_async_context(opened(settings, metrics.registry))
        encoder = Encoder(settings, model, reader, transfer, arena, metrics, store)
        await stack.enter_async_context(encoder.running())
        vision = {**model.numbers(), **reader.numbers()}
        app = EncoderApp(settings, encoder, transfer, model.report, vision)
        stack.push_async_callback(app.close)
        yield app


def _create(settings: EncoderSettings) -> Transfer:
    return create(
        settings.transfer,
        host=settings.transfer_bind,
        advertise=settings.transfer_host,
        rdma=settings.rdma,
        storage_path=settings.storage_path,
    )


def _load(settings: EncoderSettings) -> tuple[Replicas, MediaReader]:
    if not settings.model.is_dir():
        raise SetupError(f"--model {settings.model} is not a folder")
    try:
        reader = MediaReader(settings.model, settings)
    except (OSError, ValueError) as error:
        raise SetupError(f"--model {settings.model}: {error}") from None
    devices = devices_of(settings.device)
    return Replicas.load(settings.model, dtype=settings.dtype, devices=devices), reader
