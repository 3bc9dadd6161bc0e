from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from engines.ec_connector.publisher import ArenaPublisher, FolderPublisher
from engines.ec_connector.shelf import Shelf
from engines.errors import EngineError, Overloaded
from engines.language.embeddings import EmbeddingReceiver
from engines.language.sequence import Item
from engines.transfer import create
from engines.transfer.base import LayoutMismatch
from tests.support.waiting import eventually

CAT, DOG = "ca" * 32, "d0" * 32
WIDTH = 16
NBYTES = 4 * WIDTH * 4


def embedding(seed: int) -> torch.Tensor:
    return torch.full((4, WIDTH), float(seed))


class Pair:
    """A publisher with room for one embedding, and an engine that fetches."""

    def __init__(self, tmp_path: Path, ttl: float) -> None:
        self.sender, self.receiver = create("memory"), create("memory")
        self.shelf = Shelf.make(tmp_path)
        self.publisher = ArenaPublisher(self.sender, self.sender.allocate("published", NBYTES), self.shelf, ttl)
        target = self.receiver.allocate("embeddings", 8 * NBYTES)
        self._received = EmbeddingReceiver(self.receiver, target, WIDTH, timeout=5.0)

    async def __aenter__(self) -> Pair:
        await self.sender.start()
        await self.receiver.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.receiver.close()
        await self.sender.close()

    async def has_room_for(self, key: str) -> bool:
        with contextlib.suppress(Overloaded):
            return bool(await self.publisher.publish(key))
        return False

    async def fetch(self, key: str, entry: object) -> torch.Tensor:
        held = await self._received.receive([Item(key, "image", (1, 2, 2), 0, 4)], {key: entry})
        got = held.whole(0).clone()
        held.release()
        return got


async def test_what_a_worker_put_on_the_shelf_can_be_fetched_and_leaves_the_shelf(tmp_path: Path) -> None:
    async with Pair(tmp_path, ttl=60) as pair:
        assert await pair.publisher.publish(CAT) == {}
        assert CAT not in pair.publisher
        pair.shelf.put(CAT, embedding(3))
        entry = await pair.publisher.publish(CAT)
        assert (entry["num_tokens"], entry["dtype"], entry["shape"]) == (4, "float32", [4, WIDTH])
        assert CAT in pair.publisher
        assert list(pair.shelf.folder.iterdir()) == []
        assert (await pair.fetch(CAT, entry)).equal(embedding(3))
        assert await pair.publisher.publish(CAT) == entry, "asked again, it is still there"


async def test_an_embedding_that_waits_for_its_reader_keeps_its_room_and_then_makes_way(tmp_path: Path) -> None:
    async with Pair(tmp_path, ttl=60) as pair:
        pair.shelf.put(CAT, embedding(3))
        pair.shelf.put(DOG, embedding(4))
        cat = await pair.publisher.publish(CAT)
        with pytest.raises(Overloaded, match=r"cache_bytes.*handle_ttl"):
            await pair.publisher.publish(DOG)
        await pair.fetch(CAT, cat)
        await eventually(lambda: pair.has_room_for(DOG))
        dog = await pair.publisher.publish(DOG)
        assert (await pair.fetch(DOG, dog)).equal(embedding(4))
        assert (CAT in pair.publisher, DOG in pair.publisher) == (False, True)


async def test_a_file_that_is_no_embedding_takes_no_room(tmp_path: Path) -> None:
    async with Pair(tmp_path, ttl=60) as pair:
        path = pair.shelf.path(DOG)
        path.parent.mkdir()
        path.write_bytes(b"\xff" * 64)
        with pytest.raises(LayoutMismatch):
            await pair.publisher.publish(DOG)
        pair.shelf.put(CAT, embedding(1))
        path.write_bytes(pair.shelf.path(CAT).read_bytes()[:-1])
        with pytest.raises(LayoutMismatch, match="shorter"):
            await pair.publisher.publish(DOG)
        assert await pair.publisher.publish(CAT)


async def test_in_a_shared_folder_the_file_is_all_there_is(tmp_path: Path) -> None:
    shared = Shelf(tmp_path)
    publisher = FolderPublisher(shared)
    assert (await publisher.publish(CAT), CAT in publisher) == ({}, False)
    shared.put(CAT, embedding(5))
    entry = await publisher.publish(CAT)
    assert CAT in publisher
    assert entry["where"] == {"transport": "storage", "key": CAT, "nbytes": NBYTES}
    other = create("storage", storage_path=tmp_path)
    receiver = EmbeddingReceiver(other, other.allocate("embeddings", 8 * NBYTES), WIDTH, timeout=5.0)
    await other.start()
    held = await receiver.receive([Item(CAT, "image", (1, 2, 2), 0, 4)], {CAT: entry})
    assert held.whole(0).equal(embedding(5))
    held.release()
    shared.discard(CAT)
    with pytest.raises(EngineError, match="does not exist"):
        await receiver.receive([Item(CAT, "image", (1, 2, 2), 0, 4)], {CAT: entry})
    await other.close()
