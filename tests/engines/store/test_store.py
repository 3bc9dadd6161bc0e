"""What the store has is found; what it has lost, delays or gets wrong is a miss, and said in the metrics."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from deploy.processes import Child
from engines.errors import SetupError
from engines.settings import EngineSettings
from engines.store import records, store
from engines.store.store import EmbeddingStore, opened
from tests.support.checkpoints import checkpoint
from tests.support.embedding_store import STORE_BYTES, address, store_server
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROWS = bytes(range(256)) * 40


@asynccontextmanager
async def engine(server: Child, **changes: Any) -> AsyncIterator[EmbeddingStore]:
    """An engine's view of the store at `server`, connected."""
    fields = {"model": checkpoint("qwen2_vl"), "embedding_store_timeout": 5.0, "embedding_store_buffer": 1 << 20}
    settings = EngineSettings(**{**fields, "embedding_store": (address(server),), **changes})
    async with opened(settings, CollectorRegistry()) as made:
        assert made is not None
        await until(lambda: made.info()["connected"])
        yield made


def always() -> bool:
    return True


async def put(view: EmbeddingStore, name: str, rows: bytes = ROWS, valid: Callable[[], bool] = always) -> None:
    """Keep an embedding, and wait until something has come of it."""
    before = sum(view.info()["writes"].values())
    view.keep(name, "float32", b"{}", memoryview(rows), valid)
    await until(lambda: sum(view.info()["writes"].values()) > before)


async def look(view: EmbeddingStore, name: str, dtype: str = "float32") -> bytes | None:
    async with view.found(name, dtype) as record:
        return None if record is None else bytes(record.rows)


def outcomes(view: EmbeddingStore, kind: str) -> dict[str, int]:
    return {result: count for result, count in view.info()[kind].items() if count}


async def test_what_one_engine_keeps_another_finds(server: Child) -> None:
    async with engine(server) as writer, engine(server) as reader:
        assert await look(reader, "shared") is None
        await put(writer, "shared")
        assert await look(reader, "shared") == ROWS
        target = bytearray(len(ROWS))
        assert await reader.get("shared", "float32", memoryview(target))
        assert target == ROWS
        assert (outcomes(writer, "writes"), outcomes(reader, "lookups")) == ({"written": 1}, {"miss": 1, "hit": 2})


async def test_rows_are_of_one_dtype_one_length_and_one_model(server: Child) -> None:
    async with engine(server) as writer, engine(server, model=checkpoint("qwen2_vl", 1)) as stranger:
        await put(writer, "mine")
        assert await look(writer, "mine", "bfloat16") is None
        assert await look(stranger, "mine") is None
        assert not await writer.get("mine", "float32", memoryview(bytearray(len(ROWS) - 1)))


async def test_what_has_changed_while_it_was_copied_is_not_written(server: Child) -> None:
    async with engine(server) as view:
        await put(view, "evicted", valid=lambda: False)
        assert await look(view, "evicted") is None
        assert outcomes(view, "writes") == {"skipped": 1}


async def test_what_waits_too_long_or_does_not_fit_is_left_out(server: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    async with engine(server) as view:
        await put(view, "huge", bytes(2 << 20))
        monkeypatch.setattr(store, "LONGEST_QUEUE", 2)
        for number in range(3):
            view.keep(f"many {number}", "float32", b"{}", memoryview(ROWS), always)
        await until(lambda: outcomes(view, "writes") == {"skipped": 2, "written": 2})


@pytest.mark.parametrize("wrong", ["checksum", "cut", "other key", "nothing"])
async def test_a_lie_is_a_miss_and_the_truth_takes_its_place(server: Child, wrong: str) -> None:
    async with engine(server) as view:
        name = f"lie {wrong}"
        key = records.key(view._fingerprint, "float32", name)
        record = bytearray(records.size(b"{}", len(ROWS)))
        records.seal(memoryview(record), "other" if wrong == "other key" else key, b"{}", memoryview(ROWS))
        record[-1] ^= wrong == "checksum"
        length = {"cut": len(record) - 1, "nothing": 1}.get(wrong, len(record))
        assert view._link.client is not None
        with view._link.client.span(length) as span:
            assert span is not None
            span.view[:] = record[:length]
            assert await view._link.client.ask("put", key, 5.0, span) == 0
        assert await look(view, name) is None
        assert outcomes(view, "lookups") == {"error": 1}
        await put(view, name)
        assert await look(view, name) == ROWS


async def test_when_the_store_is_full_the_oldest_make_room_and_nothing_fails() -> None:
    async with store_server("--lease", "0.5") as server, engine(server, embedding_store_buffer=16 << 20) as view:
        rows = bytes(4 << 20)
        count = STORE_BYTES // len(rows)
        for number in range(count):
            await put(view, f"first {number}", rows)
        await until(lambda: view._link.client is not None)
        await asyncio.sleep(0.6)
        for number in range(count):
            await put(view, f"second {number}", rows)
        assert set(outcomes(view, "writes")) <= {"written", "refused"}
        found = [name for wave in ("first", "second") for n in range(count) if await look(view, name := f"{wave} {n}")]
        assert 0 < len(found) < 2 * count
        assert any(name.startswith("second") for name in found)


@pytest.mark.parametrize("who", ["its master", "its memory"])
async def test_a_store_that_hangs_costs_one_deadline_and_serves_again_afterwards(who: str) -> None:
    async with store_server() as server, engine(server, embedding_store_timeout=0.3) as view:
        await put(view, "a")
        (hung,) = masters(server) if who == "its master" else [server.pid]
        os.kill(hung, signal.SIGSTOP)
        assert await look(view, "a") is None
        await until(lambda: not view.info()["connected"])
        assert await look(view, "a") is None
        await put(view, "b")
        assert outcomes(view, "lookups") == {"error": 1, "skipped": 1}
        assert outcomes(view, "writes") == {"written": 1, "skipped": 1}
        os.kill(hung, signal.SIGCONT)
        await until(lambda: view.info()["connected"], 30)
        assert await look(view, "a") == ROWS


async def test_a_store_that_is_killed_and_started_again_is_empty_and_serves() -> None:
    async with store_server() as server, engine(server) as view:
        await put(view, "a")
        server.keep_port()
        await server.stop(grace=0)
        assert await look(view, "a") is None
        await server.start(30)
        await until(lambda: view.info()["connected"], 30)
        assert await look(view, "a") is None
        await put(view, "a")
        assert await look(view, "a") == ROWS


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_what_is_lost_while_it_is_written_is_never_half_there(server: Child, number: signal.Signals) -> None:
    rows, fields = bytes(15 << 20), {"embedding_store_buffer": 16 << 20, "embedding_store_timeout": 0.5}
    async with engine(server, **fields) as writer, engine(server, embedding_store_buffer=16 << 20) as reader:
        client = writer._link.client
        assert client is not None and client._process is not None
        writer.keep("half", "float32", b"{}", memoryview(rows), lambda: client._process.send_signal(number) is None)
        await until(lambda: outcomes(writer, "writes") == {"error": 1})
        assert await look(reader, "half") in (None, rows)
        assert outcomes(reader, "lookups").keys() <= {"miss", "hit"}
        await until(lambda: writer._link.client not in (None, client))
        await put(writer, "whole")
        assert await look(reader, "whole") == ROWS


async def test_what_another_engine_wrote_outlives_it(server: Child) -> None:
    async with engine(server) as reader:
        async with engine(server) as writer:
            await put(writer, "left")
            assert writer._link.client is not None
            writer._link.client.kill()
        assert await look(reader, "left") == ROWS


async def test_an_engine_starts_without_its_store_but_not_without_a_tower(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"embedding_store": ("127.0.0.1:1",), "embedding_store_buffer": 1 << 20}
    async with opened(EngineSettings(model=checkpoint("qwen2_vl"), **fields), CollectorRegistry()) as view:
        assert view is not None
        assert await look(view, "a") is None
        view.keep("a", "float32", b"{}", memoryview(ROWS), always)
        assert (outcomes(view, "lookups"), outcomes(view, "writes")) == ({"skipped": 1}, {"skipped": 1})
    with pytest.raises(SetupError, match="cannot be told apart"):
        async with opened(EngineSettings(model=tmp_path, **fields), CollectorRegistry()):
            pass


async def test_without_the_flag_there_is_none() -> None:
    async with opened(EngineSettings(model=Path("nowhere")), CollectorRegistry()) as view:
        assert view is None


def masters(server: Child) -> list[int]:
    return [int(child) for child in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()]
