"""An encoder whose pixels and model are toys: the media `b"5 cat"` becomes 5 embeddings that spell its seed.

Everything else is real: the pool, the model thread, the cache, the transfer (in memory).
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from engines.encoder.cutting import Prepared
from engines.encoder.frames import Clip
from engines.encoder.metrics import Metrics
from engines.encoder.request import MediaItem
from engines.encoder.service import Encoder
from engines.errors import BadRequest
from engines.settings import EncoderSettings
from engines.transfer import create
from engines.transfer.base import Transfer

WIDTH = 16
TOKEN_BYTES = WIDTH * 4  # one unit of the cache's alignment


def media(tokens: int, seed: str = "cat") -> str:
    return f"data:,{tokens} {seed}"


def item(tokens: int, seed: str = "cat", index: int = 0, **extra: Any) -> MediaItem:
    return MediaItem(index, f"messages[0].content[{index}]", media(tokens, seed), **extra)


def embedding(tokens: int, seed: str = "cat") -> torch.Tensor:
    """What the toy model makes of `media(tokens, seed)`."""
    return torch.full((tokens, WIDTH), float(sum(seed.encode()))) + torch.arange(tokens)[:, None]


class ToyReader:
    """Raises the 4xx of broken media for `broken`."""

    def read(self, data: bytes, item: MediaItem) -> Prepared:
        tokens, _, seed = data.decode().partition(" ")
        if seed == "broken":
            raise BadRequest("the image cannot be decoded", code="invalid_image")
        clip = Clip((0.5,), 1.0) if item.modality == "video" else None
        return Prepared(torch.full((1,), float(sum(seed.encode()))), (1, 1, int(tokens)), int(tokens), clip)


class ToyModel:
    """Computes while `gate` is open. `entered` counts forwards that began."""

    width = WIDTH
    dtype = torch.float32
    dtype_name = "float32"
    depth = 1

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.items = 0
        self.encodes = (self.encode,)

    def stage(self, item: Prepared) -> Prepared:
        return item

    def nbytes(self, tokens: int) -> int:
        return tokens * TOKEN_BYTES

    def encode(self, batch: Sequence[Prepared], outputs: Sequence[torch.Tensor]) -> None:
        self.entered.release()
        assert self.gate.wait(30)
        self.items += len(batch)
        for prepared, output in zip(batch, outputs, strict=True):
            output.copy_(prepared.pixels + torch.arange(prepared.tokens)[:, None])


@dataclass(frozen=True)
class Toy:
    encoder: Encoder
    transfer: Transfer
    peer: Transfer
    """Another engine's transfer, with an arena of its own."""
    model: ToyModel
    settings: EncoderSettings
    target: Any = field(repr=False)

    async def fetch(self, where: Mapping[str, Any], nbytes: int) -> torch.Tensor:
        """The bytes of a handle, as another engine gets them."""
        ticket = self.peer.reserve(self.target, [(0, nbytes)], timeout=10.0, on_free=lambda: None)
        try:
            await ticket.fetch(where)
            got = torch.frombuffer(self.target.buffer, dtype=torch.float32, count=nbytes // 4).clone()
        finally:
            ticket.release()
        return got.view(-1, WIDTH)

    def check(self) -> None:
        """Nothing is in flight and no byte of the arena is lost."""
        self.encoder.cache.check()
        info = self.encoder.cache_info()
        assert (info["filling"], info["leaving"], self.encoder.queue()["items"]) == (0, 0, 0)


@asynccontextmanager
async def toy_encoder(
    *, tokens: int = 16, transport: str = "memory", folder: Path | None = None, store: Any = None, **changes: Any
) -> AsyncIterator[Toy]:
    """An encoder with room for `tokens` embeddings. `folder`: of the storage transport. `store`: an EmbeddingStore."""
    settings = EncoderSettings(
        model=Path("/models/toy"), port=0, **{"cache_bytes": tokens * TOKEN_BYTES, "handle_ttl": 60.0, **changes}
    )
    transfer, peer = (create(transport, storage_path=folder) for _ in range(2))
    arena = transfer.allocate("embeddings", int(settings.cache_bytes))
    target = peer.allocate("embeddings", int(settings.cache_bytes))
    model = ToyModel()
    await transfer.start()
    await peer.start()
    try:
        encoder = Encoder(settings, model, ToyReader(), transfer, arena, Metrics(CollectorRegistry()), store)
        async with encoder.running():
            try:
                yield Toy(encoder, transfer, peer, model, settings, target)
            finally:
                model.gate.set()
    finally:
        await peer.close()
        await transfer.close()
