"""Requests that go on for their server's sake when their client is gone."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from proxy import openai
from proxy.core import Api, Job, Stage
from proxy.errors import Broken, NoInstance, Refused
from proxy.openai import Identity
from proxy.relay import Sink
from proxy.sglang.wards import Wards
from tests.fakes.media import chat, image, part
from tests.proxy.sglang.test_valve import Log
from tests.support.waiting import until

VIDEO = {"type": "video_url", "video_url": {"url": "http://v"}}


def job() -> Job:
    return openai.parse(orjson.dumps(chat(VIDEO, part(image()))), Api.CHAT, "r", Identity())


class Work:
    """A server's answer that comes when `over` is set."""

    def __init__(self, error: Exception | None = None) -> None:
        self.over = asyncio.Event()
        self.error = error
        self.cancelled = False

    async def __call__(self, sink: Sink) -> None:
        try:
            await self.over.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if self.error is not None:
            raise self.error
        sink.begin("application/json", {}, 2, b"{}")


async def test_an_answer_passes_and_so_does_its_failure() -> None:
    wards = Wards()
    async with wards.running():
        for error in (None, Broken("cut", stage=Stage.DECODE)):
            log, work = Log(), Work(error)
            work.over.set()
            if error is None:
                await wards.guard(job(), log, work)
                assert log.got == [("application/json", {}, 2, b"{}")]
            else:
                with pytest.raises(Broken):
                    await wards.guard(job(), log, work)
            assert len(wards) == 0


@pytest.mark.parametrize("leaves", [True, False])
async def test_a_request_that_is_over_goes_on_unseen_until_its_server_waits_no_more(leaves: bool) -> None:
    """The client leaves, or is told that an item has no embedding."""
    wards, log, work = Wards(), Log(), Work()
    async with wards.running():
        task = asyncio.get_running_loop().create_task(wards.guard(job(), log, work))
        await until(lambda: len(wards) == 1)
        ward = wards.get("r~")
        assert ward is not None and wards.get("r") is None
        with ward.called():
            if leaves:
                task.cancel()
            else:
                ward.fail(0, Refused(400, b"unreadable", stage=Stage.ENCODE))
                ward.fail(1, NoInstance("later"))
            with pytest.raises(asyncio.CancelledError if leaves else Refused) as raised:
                await task
            if isinstance(raised.value, Refused):
                assert raised.value.param == "messages[0].content[2]", "servers send images before videos"
            assert len(wards) == 1 and not work.cancelled
        await until(lambda: len(wards) == 0 and work.cancelled)
        assert log.got == []


async def test_what_a_server_says_of_a_black_picture_reaches_nobody() -> None:
    wards, log, work = Wards(), Log(), Work()
    async with wards.running():
        task = asyncio.get_running_loop().create_task(wards.guard(job(), log, work))
        await until(lambda: len(wards) == 1)
        ward: Any = wards.get("r~")
        with ward.called():
            ward.fail(0, NoInstance("none"))
            with pytest.raises(NoInstance):
                await task
            work.over.set()
        await until(lambda: len(wards) == 0)
        assert log.got == []


async def test_the_end_of_the_proxy_ends_them() -> None:
    wards, work = Wards(), Work()
    async with wards.running():
        task = asyncio.get_running_loop().create_task(wards.guard(job(), Log(), work))
        await until(lambda: len(wards) == 1)
        ward: Any = wards.get("r~")
        with ward.called():
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    assert work.cancelled and len(wards) == 0
