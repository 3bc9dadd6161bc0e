import asyncio
import os

import pytest
import safetensors.torch
import torch

from engines.transfer import create
from engines.transfer.base import GoneError, LayoutMismatch, TransferCancelled, TransferError, TransferTimeout
from engines.transfer.lifecycle import TicketState
from engines.transfer.storage import describe
from tests.engines.transfer.nodes import IDLE, nothing, reserve

KEY = "ab" * 32


@pytest.fixture
async def pair(nodes):
    return await nodes("storage"), await nodes("storage")


async def publish(node, tensor, key=KEY, spans=None, **options):
    flat = tensor.contiguous().view(torch.uint8).flatten().numpy().tobytes()
    node.fill(0, flat)
    return await node.transfer.publish(
        key,
        node.arena,
        spans or [(0, len(flat))],
        ttl=None,
        on_free=options.pop("on_free", nothing),
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tensor.shape,
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
async def test_published_tensors_are_safetensors_files_and_come_back(pair, tmp_path, dtype, freed):
    sender, receiver = pair
    tensor = torch.randn(12, 33).to(dtype)
    where = await publish(sender, tensor, on_free=freed("published"))
    loaded = safetensors.torch.load_file(tmp_path / "store" / KEY / "encoder_cache.safetensors")
    assert list(loaded) == ["ec_cache"]
    assert torch.equal(loaded["ec_cache"], tensor)
    size = tensor.nbytes
    ticket = reserve(receiver, [(100, size // 2), (5000, size - size // 2)], on_free=freed("ticket"))
    await ticket.fetch(where)
    got = receiver.read(100, size // 2) + receiver.read(5000, size - size // 2)
    assert torch.equal(torch.frombuffer(bytearray(got), dtype=dtype).view(12, 33), tensor)
    ticket.release()
    sender.transfer.withdraw(KEY)
    assert freed.names == ["ticket", "published"]


async def test_files_of_other_writers_are_read_and_outlive_withdrawal(pair, tmp_path):
    sender, receiver = pair
    tensor = torch.arange(64, dtype=torch.float32).view(4, 16)
    where = await publish(sender, tensor)
    sender.transfer.withdraw(KEY)
    folder = tmp_path / "store" / KEY
    safetensors.torch.save_file({"ec_cache": tensor + 1}, folder / "encoder_cache.safetensors")
    ticket = reserve(receiver, [(0, 256)])
    await ticket.fetch(where)
    assert torch.equal(torch.frombuffer(bytearray(receiver.read(0, 256)), dtype=torch.float32).view(4, 16), tensor + 1)
    ticket.release()
    assert [path.name for path in folder.iterdir()] == ["encoder_cache.safetensors"]


async def test_a_tensor_is_read_part_by_part(pair):
    sender, receiver = pair
    tensor = torch.randn(6, 16)
    where = await publish(sender, tensor)
    got = b""
    for begin, length in ((0, 100), (100, 284)):
        ticket = reserve(receiver, [(0, length)])
        assert await ticket.fetch(where, start=begin, more=not begin) == 384 - begin - length
        got += receiver.read(0, length)
        ticket.release()
    assert got == tensor.numpy().tobytes()
    ticket = reserve(receiver, [(0, 100)])
    with pytest.raises(LayoutMismatch, match="from byte 300 on"):
        await ticket.fetch(where, start=300)
    ticket.release()
    sender.transfer.withdraw(KEY)


@pytest.mark.parametrize("key", ["", "../../../etc/passwd", "AB" * 32, "ab" * 31, "ab" * 32 + "/", "ab" * 32 + "\n"])
async def test_only_hashes_are_keys(pair, key):
    sender, receiver = pair
    with pytest.raises(LayoutMismatch, match="64 lowercase hex"):
        await publish(sender, torch.zeros(4), key=key)
    ticket = reserve(receiver, [(0, 16)])
    with pytest.raises(LayoutMismatch, match="64 lowercase hex"):
        await ticket.fetch({"transport": "storage", "key": key, "nbytes": 16})
    ticket.release()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 8, b"\xff" * 100, (10**6).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"{}" + bytes(16)],
)
async def test_a_file_that_is_no_embedding_is_refused(pair, tmp_path, content):
    sender, receiver = pair
    where = await publish(sender, torch.zeros(4))
    (tmp_path / "store" / KEY / "encoder_cache.safetensors").write_bytes(content)
    ticket = reserve(receiver, [(0, 16)])
    with pytest.raises(LayoutMismatch):
        await ticket.fetch(where)
    assert ticket.state is TicketState.BROKEN
    ticket.release()
    sender.transfer.withdraw(KEY)


async def test_a_truncated_or_differently_shaped_file_is_refused(pair, tmp_path):
    sender, receiver = pair
    where = await publish(sender, torch.zeros(64))
    file = tmp_path / "store" / KEY / "encoder_cache.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    ticket = reserve(receiver, [(0, 256)])
    with pytest.raises(LayoutMismatch, match="shorter"):
        await ticket.fetch(where)
    ticket.release()
    safetensors.torch.save_file({"ec_cache": torch.zeros(3)}, file)
    ticket = reserve(receiver, [(0, 256)])
    with pytest.raises(LayoutMismatch, match="not 256 bytes"):
        await ticket.fetch(where)
    ticket.release()
    sender.transfer.withdraw(KEY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_file_says_what_it_holds(tmp_path, dtype):
    safetensors.torch.save_file({"ec_cache": torch.zeros(3, 5, dtype=dtype)}, tmp_path / "file")
    assert describe(tmp_path / "file") == (str(dtype).removeprefix("torch."), (3, 5))
    safetensors.torch.save_file({"ec_cache": torch.zeros(3, dtype=torch.int64)}, tmp_path / "file")
    with pytest.raises(LayoutMismatch, match="I64"):
        describe(tmp_path / "file")
    with pytest.raises(TransferError, match="cannot read"):
        describe(tmp_path)
    with pytest.raises(GoneError):
        describe(tmp_path / "missing")


async def test_a_missing_file_is_gone(pair, freed):
    _, receiver = pair
    ticket = reserve(receiver, [(0, 16)], on_free=freed("ticket"))
    with pytest.raises(GoneError):
        await ticket.fetch({"transport": "storage", "key": KEY, "nbytes": 16})
    with pytest.raises(GoneError):
        await ticket.fetch({"transport": "storage", "key": KEY, "nbytes": 16})
    ticket.release()
    assert freed.names == ["ticket"]


async def test_a_file_that_was_removed_is_written_again_when_asked_for(pair, tmp_path, freed):
    sender, receiver = pair
    tensor = torch.arange(4, dtype=torch.float32)
    where = await publish(sender, tensor, on_free=freed("published"))
    file = tmp_path / "store" / KEY / "encoder_cache.safetensors"
    before = file.stat().st_ino
    await sender.transfer.restore(KEY)
    assert file.stat().st_ino == before, "a file that is there is left alone"
    file.unlink()
    file.parent.rmdir()
    await sender.transfer.restore(KEY)
    ticket = reserve(receiver, [(0, 16)])
    await ticket.fetch(where)
    assert torch.equal(torch.frombuffer(bytearray(receiver.read(0, 16)), dtype=torch.float32), tensor)
    ticket.release()
    sender.transfer.withdraw(KEY)
    assert freed.names == ["published"]
    await sender.transfer.restore(KEY)


async def test_a_file_that_cannot_be_written_again_is_an_error(pair, tmp_path):
    sender, _ = pair
    await publish(sender, torch.zeros(4))
    folder = tmp_path / "store" / KEY
    (folder / "encoder_cache.safetensors").unlink()
    folder.rmdir()
    folder.touch()
    with pytest.raises(TransferError, match="cannot write"):
        await sender.transfer.restore(KEY)
    sender.transfer.withdraw(KEY)


async def test_handles_and_spans_that_do_not_fit_are_refused(pair):
    sender, receiver = pair
    where = await publish(sender, torch.zeros(4))
    ticket = reserve(receiver, [(0, 16)])
    for change in ({"transport": "shm"}, {"nbytes": 17}, {"key": None}):
        with pytest.raises(LayoutMismatch):
            await ticket.fetch(where | change)
    ticket.release()
    with pytest.raises(LayoutMismatch, match="does not describe"):
        await publish(sender, torch.zeros(4), key="cd" * 32, spans=[(0, 15)])
    with pytest.raises(ValueError, match="published already"):
        await publish(sender, torch.zeros(4))
    sender.transfer.withdraw(KEY)


async def test_a_reader_that_was_cancelled_holds_the_memory_until_it_ended(pair, tmp_path, freed):
    _, receiver = pair
    folder = tmp_path / "store" / KEY
    folder.mkdir()
    os.mkfifo(folder / "encoder_cache.safetensors")
    ticket = reserve(receiver, [(0, 16)], timeout=0.1, on_free=freed("ticket"))
    with pytest.raises(TransferTimeout):
        await ticket.fetch({"transport": "storage", "key": KEY, "nbytes": 16})
    ticket.release()
    assert freed.names == []
    assert receiver.transfer.audit()["quarantined_bytes"] == 16
    await asyncio.to_thread((folder / "encoder_cache.safetensors").write_bytes, b"")
    async with asyncio.timeout(10):
        while freed.names != ["ticket"]:
            await asyncio.sleep(0.01)


async def test_an_unused_ticket_expires_and_kv_is_refused(pair):
    sender, receiver = pair
    ticket = reserve(receiver, [(0, 16)], timeout=0.01)
    with pytest.raises(TransferTimeout):
        await ticket.wait()
    with pytest.raises(TransferTimeout):
        await ticket.fetch({"transport": "storage", "key": KEY, "nbytes": 16})
    with pytest.raises(TransferError, match="carries no KV"):
        ticket.offer()
    with pytest.raises(TransferError, match="carries no KV"):
        await sender.transfer.open({}, timeout=1)
    ticket.release()
    released = reserve(receiver, [(0, 16)])
    released.release()
    with pytest.raises(TransferCancelled):
        await released.wait()
    assert not sender.transfer.carries_kv


async def test_nothing_is_promised_in_a_folder(nodes):
    node = await nodes("storage")
    with pytest.raises(TransferError, match="once its bytes are there"):
        await publish(node, torch.zeros(4), promised=True)
    with pytest.raises(LookupError):
        node.transfer.fulfil(KEY)
    assert node.transfer.audit() == IDLE


async def test_a_ttl_ends_a_publication(pair, freed):
    sender, _ = pair
    sender.fill(0, bytes(16))
    await sender.transfer.publish(
        KEY, sender.arena, [(0, 16)], ttl=0.01, on_free=freed("published"), dtype="uint8", shape=[16]
    )
    async with asyncio.timeout(10):
        while freed.names != ["published"]:
            await asyncio.sleep(0.01)


async def test_a_folder_that_cannot_be_used_is_said_at_start(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TransferError, match="cannot use"):
        await create("storage", storage_path=tmp_path / "file" / "store").start()
