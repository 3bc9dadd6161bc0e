import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from bench.scripted import answers
from bench.scripted.bare import Client as Relayed
from bench.scripted.bare import Engines, Message
from bench.scripted.client import Client, Ending
from bench.scripted.engine import Engine
from bench.scripted.faults import Fault
from bench.scripted.verdict import Verdict, judge

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


@asynccontextmanager
async def bare(prefill: Engine, decode: Engine) -> AsyncIterator[Client]:
    engines = Engines(prefill.url), Engines(decode.url)
    server = await asyncio.get_running_loop().create_server(lambda: Relayed(*engines), "127.0.0.1", 0)
    async with server:
        client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        yield client
        client.close()


@pytest.mark.parametrize("message", [CHUNKED, SIZED], ids=["chunked", "sized"])
def test_a_message_is_whole_with_its_last_byte(message: bytes) -> None:
    reading = Message()
    assert [reading.feed(message[at : at + 1]) for at in range(len(message))].index(True) == len(message) - 1
    assert Message().feed(message)


async def test_answers_are_those_of_decode_after_prefill() -> None:
    async with Engine("prefill") as prefill, Engine("decode") as decode, bare(prefill, decode) as client:
        for stream in (False, True, True):
            answer = await client.post(answers.CHAT, answers.request("q", 5, stream=stream), timeout=5)
            assert judge(answer, answers.text("q", 5), stream=stream) is Verdict.SERVED
        assert prefill.counters.calls == decode.counters.calls == 3


async def test_an_engine_that_breaks_off_ends_the_connection() -> None:
    async with Engine("prefill") as prefill, Engine("decode") as decode, bare(prefill, decode) as client:
        decode.fault = Fault.CUT
        answer = await client.post(answers.CHAT, answers.request("q", 9, stream=True), timeout=5)
        assert answer.ending is Ending.BROKEN
