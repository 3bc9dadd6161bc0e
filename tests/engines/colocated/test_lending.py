"""Media of a prompt become loans of what the encoder beside it computes; over a real cache, pool and model thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import orjson
import pytest
import torch

from engines.colocated.lending import Lender, Loan
from engines.encoder.cache import Entry
from engines.encoder.cutting import Prepared
from engines.encoder.request import MediaItem
from engines.errors import BadRequest, Overloaded, PeerFailed
from tests.support.encoding import Toy, ToyReader, embedding, item, media, toy_encoder
from tests.support.waiting import until


def image(tokens: int, seed: str = "cat") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": media(tokens, seed)}}


def body(*parts: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [*parts]}]
    return {"messages": messages, "stream": True, **fields}


def loans(lent: Mapping[str, Any]) -> list[Loan]:
    """Of the user's parts, in order."""
    entries = lent["ec_transfer_params"]
    return [entries[part["uuid"]] for part in lent["messages"][1]["content"] if part["type"] == "image_embeds"]


async def rest(toy: Toy) -> None:
    """Nothing is held on anybody's account."""
    await until(lambda: not (toy.encoder.queue()["items"] or toy.encoder.cache_info()["pinned"]))
    toy.check()


async def test_media_become_their_grids_before_they_are_computed_and_rows_are_read_in_place() -> None:
    async with toy_encoder() as toy:
        toy.model.gate.clear()
        text = {"type": "text", "text": "which?"}
        async with Lender(toy.encoder).lend(body(image(3, "cat"), text, image(5, "dog"), seed=7)) as lent:
            first, middle, last = lent["messages"][1]["content"]
            assert first["image_embeds"] == {"image_grid_thw": [1, 1, 3]} and middle is text
            assert last["image_embeds"] == {"image_grid_thw": [1, 1, 5]}
            assert (lent["seed"], lent["stream"], lent["messages"][0]) == (7, True, body()["messages"][0])
            asked = [asyncio.create_task(loan.rows()) for loan in loans(lent)]
            await asyncio.sleep(0)
            assert not any(task.done() for task in asked)
            toy.model.gate.set()
            cat, dog = await asyncio.gather(*asked)
            assert cat.equal(embedding(3, "cat")) and dog.equal(embedding(5, "dog"))
            arena = torch.frombuffer(toy.encoder._arena.buffer, dtype=torch.uint8)
            assert {rows.data_ptr() - arena.data_ptr() for rows in (cat, dog)} in ({0, 3 * 64}, {0, 5 * 64})
            assert toy.encoder.cache_info()["pinned"] == 2
        del arena, cat, dog
        await rest(toy)


async def test_a_body_without_media_is_left_alone() -> None:
    async with toy_encoder() as toy:
        embeds = {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 1, 3]}, "uuid": "a" * 64}
        for given in (body(embeds), {"prompt": "hello"}, {"messages": "none"}, {"messages": [5, {"content": "text"}]}):
            async with Lender(toy.encoder).lend(given) as lent:
                assert lent is given


async def test_the_same_content_twice_is_one_loan_and_handles_that_came_along_are_kept() -> None:
    async with toy_encoder() as toy:
        theirs = {"b" * 64: {"shape": [1, 16]}}
        async with Lender(toy.encoder).lend(body(image(4), image(4), ec_transfer_params=theirs)) as lent:
            one, other = loans(lent)
            assert one is other and (await one.rows()).equal(embedding(4))
            assert lent["ec_transfer_params"].keys() - {"b" * 64} == {lent["messages"][1]["content"][0]["uuid"]}
            assert toy.model.items == 1
            one.release()
            one.release()
            await rest(toy)
        with pytest.raises(BadRequest, match="ec_transfer_params must be an object"):
            async with Lender(toy.encoder).lend(body(image(4), ec_transfer_params=[])):
                pass
        await rest(toy)


async def handle(toy: Toy, tokens: int, seed: str) -> dict[str, Any]:
    """As an answer of the encoder tells it, which names it then."""
    entry = await toy.encoder.encode(item(tokens, seed))
    toy.encoder.named(entry)
    toy.encoder.release(entry)
    return {entry.key: {"shape": [tokens, 16], "where": orjson.loads(orjson.dumps(entry.value.where))}}


async def test_a_handle_of_the_encoder_itself_is_read_in_place_and_counts_as_read() -> None:
    async with toy_encoder() as toy:
        ours, theirs = await handle(toy, 4, "cat"), {"b" * 64: {"where": {"key": "b" * 64}}, "c" * 64: "broken"}
        forged = {key: {**entry, "where": {**entry["where"], "secret": "guessed"}} for key, entry in ours.items()}
        async with Lender(toy.encoder).lend({"prompt": "", "ec_transfer_params": {**forged, **theirs}}) as lent:
            assert lent["ec_transfer_params"] == {**forged, **theirs}, "the transfer judges those"
        async with Lender(toy.encoder).lend({"prompt": "", "ec_transfer_params": {**ours, **theirs}}) as lent:
            (loan,) = (lent["ec_transfer_params"][key] for key in ours)
            assert (await loan.rows()).equal(embedding(4, "cat"))
            assert {name: lent["ec_transfer_params"][name] for name in theirs} == theirs
            assert toy.encoder.cache_info()["pinned"] == 1
        await rest(toy)


async def test_a_handle_that_was_promised_is_waited_for() -> None:
    async with toy_encoder() as toy:
        toy.model.gate.clear()
        placed: asyncio.Queue[Entry] = asyncio.Queue()
        encoding = asyncio.create_task(toy.encoder.encode(item(4, "cat"), lambda entry, _: placed.put_nowait(entry)))
        entry = await placed.get()
        entries = {entry.key: {"where": entry.value.where}}
        async with Lender(toy.encoder).lend({"prompt": "", "ec_transfer_params": entries}) as lent:
            reading = asyncio.create_task(lent["ec_transfer_params"][entry.key].rows())
            await asyncio.sleep(0)
            toy.model.gate.set()
            assert (await reading).equal(embedding(4, "cat"))
            toy.encoder.release(await encoding)
        await rest(toy)


async def test_an_embedding_that_is_gone_before_it_is_borrowed_may_be_encoded_again() -> None:
    async with toy_encoder() as toy:
        with pytest.raises(PeerFailed) as caught:
            await toy.encoder.held("a" * 64)
        assert (caught.value.code, caught.value.stage, caught.value.retryable) == ("embedding_gone", "encode", True)


async def test_what_the_encoder_refuses_names_the_item_and_its_stage() -> None:
    async with toy_encoder() as toy:
        lender = Lender(toy.encoder)
        with pytest.raises(BadRequest, match="cannot be decoded") as caught:
            async with lender.lend(body({"type": "text", "text": "x"}, image(3, "broken"), image(4))):
                pass
        assert (caught.value.param, caught.value.stage) == ("messages[1].content[1]", "encode")
        for kind in ("input_audio", "image"):
            with pytest.raises(BadRequest, match=kind) as caught:
                async with lender.lend(body({"type": kind, kind: {}})):
                    pass
            assert caught.value.param == "messages[1].content[0]"
        await rest(toy)


async def test_who_leaves_before_the_forward_spares_it() -> None:
    async with toy_encoder() as toy:
        toy.model.gate.clear()
        lender = Lender(toy.encoder)
        async with lender.lend(body(image(2, "first"))) as held:
            await asyncio.to_thread(toy.model.entered.acquire)
            async with lender.lend(body(image(3, "second"))):
                pass
            toy.model.gate.set()
            assert (await loans(held)[0].rows()).equal(embedding(2, "first"))
        assert toy.model.items == 1
        await rest(toy)


async def test_a_full_cache_is_waited_for_in_the_order_of_arrival() -> None:
    async with toy_encoder(tokens=10) as toy:
        lender, order = Lender(toy.encoder), list[str]()
        leave = {seed: asyncio.Event() for seed in "abc"}

        async def ask(seed: str, *tokens: int) -> None:
            parts = [image(count, f"{seed}{n}") for n, count in enumerate(tokens)]
            async with lender.lend(body(*parts)) as lent:
                order.append(seed)
                for loan, count, n in zip(loans(lent), tokens, range(9), strict=False):
                    assert (await loan.rows()).equal(embedding(count, f"{seed}{n}"))
                await leave[seed].wait()

        async with asyncio.TaskGroup() as group, asyncio.timeout(30):
            group.create_task(ask("a", 4, 4))
            await until(lambda: order == ["a"])
            group.create_task(ask("b", 5, 5))
            await until(lambda: lender._turn.locked())
            group.create_task(ask("c", 2))
            await asyncio.sleep(0.05)
            assert order == ["a"], "c would have room, and is not let past b"
            leave["a"].set()
            await until(lambda: order == ["a", "b"])
            leave["b"].set()
            await until(lambda: order == ["a", "b", "c"])
            leave["c"].set()
        await rest(toy)


async def test_what_cannot_fit_though_nobody_borrows_is_refused_at_once() -> None:
    async with toy_encoder(tokens=10) as toy:
        with pytest.raises(Overloaded, match="--cache-bytes"):
            async with Lender(toy.encoder).lend(body(image(6, "a"), image(6, "b"))):
                pass
        await rest(toy)


async def test_a_cache_that_stays_full_is_not_waited_for_for_ever() -> None:
    async with toy_encoder(tokens=10, encode_timeout=0.2) as toy:
        lender = Lender(toy.encoder)
        async with lender.lend(body(image(6, "a"))) as lent:
            await loans(lent)[0].rows()
            with pytest.raises(Overloaded, match="--cache-bytes"):
                async with lender.lend(body(image(6, "b"))):
                    pass
        await rest(toy)


class FirstAlone(ToyReader):
    """Reads what is not called 0 only once it is `let`."""

    def __init__(self) -> None:
        self.let = threading.Event()

    def read(self, data: bytes, item: MediaItem) -> Prepared:
        assert data.endswith(b"0") or self.let.wait(30)
        return super().read(data, item)


async def test_two_that_stand_in_each_others_way_are_both_served() -> None:
    async with toy_encoder(tokens=12, media_workers=6) as toy:
        reader = toy.encoder._reader = FirstAlone()
        toy.model.gate.clear()
        lender = Lender(toy.encoder)

        async def ask(*seeds: str) -> None:
            async with lender.lend(body(*(image(4, seed) for seed in seeds))) as lent:
                for seed, loan in zip(seeds, loans(lent), strict=True):
                    assert (await loan.rows()).equal(embedding(4, seed))

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            group.create_task(ask("a0", "a1", "a2"))
            group.create_task(ask("b0", "b1", "b2"))
            await until(lambda: toy.encoder.cache_info()["filling"] == 2)
            reader.let.set()
            await until(lender._turn.locked)
            toy.model.gate.set()
        await rest(toy)


async def test_who_waits_for_room_hears_of_one_that_leaves_before_it_has_borrowed() -> None:
    async with toy_encoder(tokens=10, media_workers=4) as toy:
        reader = toy.encoder._reader = FirstAlone()
        toy.model.gate.clear()
        lender = Lender(toy.encoder)

        async def ask(*parts: Mapping[str, Any]) -> None:
            async with lender.lend(body(*parts)) as lent:
                await asyncio.gather(*(loan.rows() for loan in loans(lent)))

        async with asyncio.timeout(30):
            leaving = asyncio.create_task(ask(image(4, "a0"), image(5, "slow")))
            await asyncio.to_thread(toy.model.entered.acquire)
            staying = asyncio.create_task(ask(image(4, "b0"), image(4, "c0")))
            await until(lambda: lender._turn.locked())
            leaving.cancel()
            await asyncio.wait([leaving])
            toy.model.gate.set()
            await staying
            reader.let.set()
        await rest(toy)


async def test_who_comes_behind_others_that_wait_for_room_does_not_wait_for_ever() -> None:
    async with toy_encoder(tokens=10, encode_timeout=0.2) as toy:
        lender = Lender(toy.encoder)
        async with lender._turn:
            with pytest.raises(Overloaded, match="others wait for room"):
                async with lender.lend(body(image(1))):
                    pass
        await rest(toy)
