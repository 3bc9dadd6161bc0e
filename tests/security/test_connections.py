"""Connections that are held, flooded or made ambiguous: others are served meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from proxy import derived
from proxy.http.server import Limits
from tests.fakes.deployment import Deployment, deployment
from tests.fakes.media import chat
from tests.support.raw_http import Client

SLOW = 60
HOST = b"Host: a\r\n"


@pytest.fixture
async def d(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Deployment]:
    """With the patience of a second, where it is minutes else."""
    short = Limits(head_bytes=4096, head_seconds=0.4, idle_seconds=0.4, body_seconds=0.4, write_seconds=0.4)
    monkeypatch.setattr(derived, "http_limits", lambda settings: short)
    async with deployment("1b") as found:
        yield found
        assert (await found.post(chat())).status == 200


async def connected(d: Deployment) -> Client:
    return Client(*await asyncio.open_connection("127.0.0.1", d.proxy.port))


async def trickled(client: Client, data: bytes) -> None:
    """Byte by byte, until the other side has had enough."""
    try:
        for byte in data:
            client.send(bytes([byte]))
            await client.writer.drain()
            await asyncio.sleep(0.02)
    except ConnectionError:
        pass


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST,
        b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + b"Content-Length: 1000000\r\n\r\n{",
        b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    ],
    ids=["silence", "a head", "a body", "chunks"],
)
async def test_slow_clients_hold_up_nobody_and_are_let_go(d: Deployment, begun: bytes) -> None:
    clients = [await connected(d) for _ in range(SLOW)]
    for client in clients:
        client.send(begun)
    assert (await d.post(chat())).status == 200
    said = await asyncio.gather(*(client.closed() for client in clients))
    assert all(answer == b"" or b" 408 " in answer for answer in said)
    assert all(b" 408 " in answer for answer in said) or not begun
    for client in clients:
        client.close()


async def test_a_head_that_comes_a_byte_at_a_time_has_one_deadline_for_all(d: Deployment) -> None:
    client = await connected(d)
    sending = asyncio.create_task(trickled(client, b"GET /health HTTP/1.1\r\n" + HOST + b"x-a: " + b"b" * 2000))
    assert b" 408 " in await client.closed()
    client.close()
    await sending


@pytest.mark.parametrize(
    "head",
    [
        b"X-A: " + b"b" * 5000 + b"\r\n",
        b"X-A: b\r\n" * 300,
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: 0x5\r\n",
        b"Content-Length: 99999999999999999999\r\n",
        b"X-A: b\r\n folded\r\n",
        b"X A: b\r\n",
        b"X-A\x00: b\r\n",
        b"X-A: b\x00\r\n",
        b"Host: b\r\n",
        b"X-A: b\nX-B: c\r\n",
        b": b\r\n",
    ],
)
async def test_heads_that_two_readers_could_take_for_two_things(d: Deployment, head: bytes) -> None:
    client = await connected(d)
    client.send(b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + head + b"\r\n")
    said = await client.closed()
    client.close()
    assert said.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 ", b"HTTP/1.1 431 ", b"HTTP/1.1 501 "))
    assert said.count(b"HTTP/1.1 ") == 1 and b"\r\nconnection: close\r\n" in said


async def test_a_request_smuggled_behind_another_is_none(d: Deployment) -> None:
    client = await connected(d)
    inner = b"GET /metrics HTTP/1.1\r\n" + HOST + b"\r\n"
    client.send(
        b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\n" + inner
    )
    said = await client.closed()
    assert said.startswith(b"HTTP/1.1 400 ") and said.count(b"HTTP/1.1 ") == 1
    client.close()


async def test_headers_of_a_client_end_no_line_of_a_head_or_a_log(
    d: Deployment, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = await d.post(chat(), x_request_id="a; b", x_custom="c")
    assert answer.status == 200 and answer.headers["x-request-id"] != "a; b"
    call = d.combined[0].calls[-1]
    assert call.headers["x-custom"] == "c" and call.id == answer.headers["x-request-id"]


async def test_ids_that_forge_lines_are_replaced(d: Deployment) -> None:
    client = await connected(d)
    client.send(b"GET /health HTTP/1.1\r\n" + HOST + b"x-request-id: " + b"a" * 200 + b"\r\n\r\n")
    _, headers, _ = await client.answer()
    assert len(headers["x-request-id"]) == 32
    client.close()
