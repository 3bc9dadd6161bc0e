"""A client's connection, byte for byte, over real sockets."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.http.message import HttpError, Response
from proxy.http.server import Request
from proxy.tls import Listener
from tests.support.raw_http import serving, until
from tests.support.tls import Authority


async def echo(request: Request) -> Response:
    return Response(200, request.path.encode() + b":" + bytes(await request.read()))


def post(body: bytes, path: bytes = b"/", extra: bytes = b"") -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n%b\r\n%b" % (path, len(body), extra, body)


CHUNKED = b"POST /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x\r\nde\r\n0\r\n\r\n"
TWO_WAYS = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
LARGE = bytes(range(256)) * 2000


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with serving(echo) as s:
        client = await s.connect()
        client.send(
            post(b"one", b"/1")
            + CHUNKED
            + b"GET /g HTTP/1.1\r\nHost: a\r\n\r\n"
            + post(LARGE, b"/2")
            + post(b"", b"/3")
        )
        bodies = [(await client.answer())[2] for _ in range(5)]
        assert bodies == [b"/1:one", b"/c:abcde", b"/g:", b"/2:" + LARGE, b"/3:"]


STREAM = post(b"one", b"/1") + CHUNKED + b"\r\n" + post(b"x" * 70, b"/2") + CHUNKED


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, len(STREAM) - 1), max_size=6, unique=True))
async def test_where_the_stream_is_cut_does_not_matter(cuts: list[int]) -> None:
    async with serving(echo) as s:
        client = await s.connect()
        for a, b in itertools.pairwise([0, *sorted(cuts), len(STREAM)]):
            client.send(STREAM[a:b])
            await client.writer.drain()
            await asyncio.sleep(0.001)
        assert [(await client.answer())[2] for _ in range(4)] == [
            b"/1:one",
            b"/c:abcde",
            b"/2:" + b"x" * 70,
            b"/c:abcde",
        ]


async def test_byte_by_byte() -> None:
    async with serving(echo) as s:
        client = await s.connect()
        for byte in CHUNKED:
            client.send(bytes([byte]))
            await client.writer.drain()
            await asyncio.sleep(0)
        assert (await client.answer())[2] == b"/c:abcde"


async def test_a_body_of_many_megabytes_grows_with_its_bytes() -> None:
    async with serving(echo) as s:
        body = LARGE * 40  # 20 MB: more than is allocated at once
        assert (await s.ask(post(body)))[2] == b"/:" + body


async def test_expect_is_answered_only_once_the_body_is_wanted() -> None:
    async def handle(request: Request) -> Response:
        if request.path == "/no":
            raise HttpError(403, "no")
        return await echo(request)

    async with serving(handle) as s:
        client = await s.connect()
        client.send(post(b"", b"/yes", b"Expect: 100-continue\r\n").replace(b"Length: 0", b"Length: 2"))
        assert (await client.answer())[0] == 100
        client.send(b"ab")
        assert (await client.answer())[2] == b"/yes:ab"
        client.send(post(b"", b"/no", b"Expect: 100-continue\r\n").replace(b"Length: 0", b"Length: 2"))
        status, headers, _ = await client.answer()
        assert (status, headers["connection"]) == (403, "close")
        assert await client.closed() == b""


async def test_a_body_that_is_not_wanted_does_not_cut_the_answer() -> None:
    async with serving(echo, body_bytes=1000) as s:
        client = await s.connect()
        client.send(post(LARGE * 4))
        status, headers, body = await client.answer()
        assert (status, headers["connection"]) == (413, "close") and b"larger than 1000 bytes" in body
        assert await client.closed() == b""


async def test_chunks_past_the_limit_are_refused_in_the_middle() -> None:
    async with serving(echo, body_bytes=1000) as s:
        client = await s.connect()
        client.send(CHUNKED[: CHUNKED.find(b"0\r\n\r\n")])
        client.send(b"3e8\r\n")
        assert (await client.answer())[0] == 413


async def test_bodies_may_be_packed_but_only_to_the_limit() -> None:
    async with serving(echo, body_bytes=100_000) as s:
        extra = b"Content-Encoding: gzip\r\n"
        assert (await s.ask(post(gzip.compress(b"ab" * 999), b"/", extra)))[2] == b"/:" + b"ab" * 999
        assert (await s.ask(post(gzip.compress(bytes(200_000)), b"/", extra)))[0] == 413
        assert (await s.ask(post(b"x", b"/", b"Content-Encoding: br\r\n")))[0] == 415


@pytest.mark.parametrize(
    "data",
    [
        TWO_WAYS + b"0\r\n\r\n" + SMUGGLED,
        CHUNKED.replace(b"3\r\n", b"zz\r\n") + SMUGGLED,
        b"GET / HTTP/1.1\nHost: a\n\nGET /smuggled HTTP/1.1\nHost: a\n\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n",
    ],
    ids=["CL+TE", "bad chunk", "bare LF", "TLS"],
)
async def test_what_is_refused_ends_the_connection(data: bytes) -> None:
    async with serving(echo) as s:
        client = await s.connect()
        client.send(data)
        assert (await client.answer())[0] == 400
        assert await client.closed() == b"", "nothing behind it is answered"


async def test_heads_have_a_size() -> None:
    async with serving(echo, head_bytes=1000) as s:
        assert (await s.ask(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 2000))[0] == 431


@pytest.mark.parametrize("begun", [b"GET / HT", post(b"")[:-2] + b"X", post(b"abc")[:-1], CHUNKED[:-4]])
async def test_clients_that_do_not_go_on_are_told(begun: bytes) -> None:
    async with serving(echo, head_seconds=0.1, body_seconds=0.1) as s:
        client = await s.connect()
        client.send(begun)
        assert (await client.answer())[0] == 408
        assert await client.closed() == b""


async def test_idle_connections_are_closed_without_a_word() -> None:
    async with serving(echo, idle_seconds=0.1) as s:
        fresh, used = await s.connect(), await s.connect()
        used.send(post(b""))
        assert (await used.answer())[0] == 200
        assert await fresh.closed() == await used.closed() == b""


async def test_keep_alive_as_the_client_says() -> None:
    async with serving(echo) as s:
        client = await s.connect()
        client.send(b"GET /1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert (await client.answer())[1]["connection"] == "close"
        assert await client.closed() == b""
        old = await s.connect()
        old.send(b"GET /2 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert (await old.answer())[1]["connection"] == "keep-alive"
        old.send(b"GET /3 HTTP/1.0\r\n\r\n")
        assert (await old.answer())[2] == b"/3:" and await old.closed() == b""


async def test_head_and_bodiless_answers_have_no_body() -> None:
    async def handle(request: Request) -> Response:
        return Response(204 if request.path == "/204" else 200, b"" if request.path == "/204" else b"body")

    async with serving(handle) as s:
        client = await s.connect()
        client.send(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\nGET /204 HTTP/1.1\r\nHost: a\r\n\r\n" + post(b""))
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert b"content-length: 4" in head
        assert b" 204 " in await client.reader.readuntil(b"\r\n\r\n")
        assert (await client.answer())[2] == b"body"


async def test_streams_come_in_chunks_and_for_old_clients_until_the_end() -> None:
    async def handle(request: Request) -> None:
        request.begin(200, {"x": "y"}, data=b"first ")
        request.write(b"second ")
        request.write(b"")
        if (writer := request.chunk_writer()) is not None:
            writer(b"5\r\nthird\r\n")
        request.write(b"z" * 100_000)
        request.end()

    async with serving(handle) as s:
        status, headers, body = await s.ask(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (status, headers["x"]) == (200, "y") and body == b"first second third" + b"z" * 100_000
        status, headers, body = await s.ask(b"GET / HTTP/1.0\r\n\r\n")
        assert "transfer-encoding" not in headers and body == b"first second " + b"z" * 100_000


@pytest.mark.parametrize("phase", ["before the body", "in the body", "after the body", "in the answer"])
@pytest.mark.parametrize("way", ["reset", "close", "half"])
async def test_a_client_that_leaves_cancels_its_request(phase: str, way: str) -> None:
    reached, left = asyncio.Event(), asyncio.Event()

    async def handle(request: Request) -> None:
        try:
            if phase != "before the body":
                reading = request.read()
                if phase == "in the body":
                    reached.set()
                await reading
            if phase == "in the answer":
                request.begin(200, {}, data=b"x")
            reached.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            left.set()
            raise

    async with serving(handle) as s, asyncio.timeout(10):
        client = await s.connect()
        whole = post(b"abc")
        client.send(whole[:-1] if phase == "in the body" else whole)
        await reached.wait()
        if way == "half":
            client.writer.write_eof()
        elif way == "close":
            client.writer.close()
        else:
            client.close()
        await left.wait()
        await until(lambda: "0 connections" in repr(s.server))


async def test_chunks_for_a_client_that_has_left_go_nowhere() -> None:
    reached, written = asyncio.Event(), asyncio.Event()

    async def handle(request: Request) -> None:
        request.begin(200, {}, data=b"x")
        writer = request.chunk_writer()
        assert writer is not None
        reached.set()
        try:
            await asyncio.Event().wait()
        finally:
            writer(b"1\r\ny\r\n")  # uvloop's transports refuse it once they are closed
            written.set()

    async with serving(handle) as s, asyncio.timeout(10):
        client = await s.connect()
        client.send(post(b""))
        await reached.wait()
        client.close()
        await written.wait()


async def test_a_slow_client_stops_the_flow_and_memory_stays() -> None:
    stopped, going_on = asyncio.Event(), asyncio.Event()

    async def handle(request: Request) -> None:
        request.begin(200, {})
        request.throttle(stopped.set, going_on.set)
        sent = 0
        while not request.paused:
            request.write(bytes(1 << 16))
            sent += 1 << 16
            assert sent < 64 << 20, "no pause"
        assert stopped.is_set()
        await going_on.wait()
        request.end()

    async with serving(handle) as s:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        sock.connect(("127.0.0.1", s.port))
        client = await s.connect_socket(sock)
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        async with asyncio.timeout(10):
            await stopped.wait()
        assert not going_on.is_set()
        assert len((await client.answer())[2]) > 0
        assert going_on.is_set()


async def test_a_client_that_takes_nothing_is_cut_in_the_end() -> None:
    left = asyncio.Event()

    async def handle(request: Request) -> None:
        request.begin(200, {})
        while not request.paused:
            request.write(bytes(1 << 20))
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            left.set()
            raise

    async with serving(handle, write_seconds=0.1) as s:
        client = await s.connect(limit=1)
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        async with asyncio.timeout(10):
            await left.wait()


async def test_an_answer_left_open_is_cut() -> None:
    async def handle(request: Request) -> None:
        request.begin(200, {}, data=b"half of it")

    async with serving(handle) as s:
        client = await s.connect()
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert not (await client.closed()).endswith(b"0\r\n\r\n")


async def test_early_requests_are_bounded() -> None:
    gate = asyncio.Event()

    async def handle(request: Request) -> Response:
        await gate.wait()
        return Response(200, b"ok")

    async with serving(handle) as s:
        client = await s.connect()
        client.send(post(b"") * 6_000)
        for _ in range(50):
            await asyncio.sleep(0.001)
        (connection,) = s.server._connections
        assert len(connection._buffer) < 6_000 * len(post(b""))
        gate.set()
        for _ in range(6_000):
            assert (await client.answer())[2] == b"ok"


async def test_a_request_that_is_cut_before_its_handler_began_leaves_nothing() -> None:
    async with serving(echo) as s:
        client = await s.connect()
        await until(lambda: len(s.server._connections) == 1)
        (connection,) = s.server._connections
        connection._received(post(b"x"))
        assert connection.busy
        connection.abort()
        assert await client.closed() == b""
        await until(lambda: not s.server._connections)


async def test_who_sends_a_request_is_known_by_address(tmp_path: Path) -> None:
    async def who(request: Request) -> Response:
        return Response(200, request.peer.encode())

    ca = Authority(tmp_path)
    get = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    async with serving(who) as plain, serving(who, tls=Listener(ca.files("server")).context) as secured:
        assert (await plain.ask(get))[2] == b"127.0.0.1"
        client = await secured.connect(ssl=ca.trusting())
        client.send(get)
        assert (await client.answer())[2] == b"127.0.0.1"
