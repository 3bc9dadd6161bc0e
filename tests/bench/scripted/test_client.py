import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bench.scripted.client import Answer, Client, Ending


@asynccontextmanager
async def saying(*answers: bytes, close: bool = False) -> AsyncIterator[Client]:
    """A client of a server that says so for each request, whatever it is."""
    said = iter(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 20):
            writer.write(next(said))
            await writer.drain()
            if close:
                break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield client
    finally:
        client.close()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0.01)  # the server's side of the connection ends


async def post(client: Client, **more: float) -> Answer:
    return await client.post("/", b"{}", timeout=more.pop("timeout", 10.0), **more)


async def test_answers_on_one_connection() -> None:
    sized, chunked = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
        b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked",
    )
    async with saying(sized, chunked + b"\r\n\r\n2\r\nyo\r\n0\r\n\r\n") as client:
        one, two = await post(client), await post(client)
    assert (one.status, one.body, one.ending) == (200, b"hi", Ending.COMPLETE)
    assert (two.status, two.body, two.ending) == (201, b"yo", Ending.COMPLETE)
    assert one.sent <= (one.first or 0) <= one.ended <= two.sent


async def test_an_interim_answer_is_passed_over() -> None:
    async with saying(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi") as client:
        assert (await post(client)).body == b"hi"


async def test_a_body_to_the_close_is_complete_and_a_short_one_is_not() -> None:
    async with saying(b"HTTP/1.1 200 OK\r\n\r\nhi", close=True) as client:
        assert (await post(client)).ending is Ending.COMPLETE
    async with saying(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi", close=True) as client:
        answer = await post(client)
    assert (answer.ending, answer.body) == (Ending.BROKEN, b"hi")


async def test_what_is_not_http_is_broken() -> None:
    for said in (b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"):
        async with saying(said) as client:
            assert (await post(client)).ending is Ending.BROKEN


async def test_patience_ends_and_clients_leave() -> None:
    half = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi"
    async with saying(half) as client:
        hung = await post(client, timeout=0.1)
    async with saying(half) as client:
        left = await post(client, leave_after=0.1)
    assert (hung.ending, left.ending) == (Ending.HUNG, Ending.LEFT)


async def test_nobody_there_is_broken() -> None:
    async with saying() as client:
        pass
    answer = await post(client)
    assert (answer.status, answer.ending, answer.first_byte) == (0, Ending.BROKEN, float("inf"))
