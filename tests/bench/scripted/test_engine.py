import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest

from bench.scripted import answers
from bench.scripted.client import Answer, Client, Ending
from bench.scripted.engine import ROLES, Engine, Pace, Rooms
from bench.scripted.server import Connection, Request
from bench.scripted.verdict import Verdict, judge


async def post(
    engine: Engine, *, stream: bool = False, id: str = "", leave_after: float | None = None, **more: Any
) -> Answer:
    body = orjson.loads(answers.request("q", 4, stream=stream)) | more
    client = Client(engine.url)
    try:
        return await client.post(answers.CHAT, orjson.dumps(body), timeout=10, request_id=id, leave_after=leave_after)
    finally:
        client.close()


def served(answer: Answer, tokens: int = 4, *, stream: bool = False) -> bool:
    return judge(answer, answers.text("q", tokens), stream=stream) is Verdict.SERVED


@pytest.mark.parametrize("interval", [0.0, 0.001])
async def test_a_combined_engine_says_as_many_tokens_as_are_asked_for(interval: float) -> None:
    async with Engine("both", Pace(interval=interval)) as engine:
        assert served(await post(engine))
        assert served(await post(engine, stream=True), stream=True)
        assert served(await post(engine, max_completion_tokens=2), 2)
        assert (engine.counters.calls, engine.counters.running) == (3, 0)


async def test_pull_prefill_gives_the_parameters_of_its_kv() -> None:
    async with Engine("prefill") as engine:
        answer = await post(engine, kv_transfer_params={"do_remote_decode": True, "remote_block_ids": None}, id="7")
        params = orjson.loads(answer.body)["kv_transfer_params"]
        assert served(answer, 1)
        assert (params["remote_request_id"], params["remote_port"]) == ("chatcmpl-7", engine.port)
        pushed = await post(engine, kv_transfer_params={"do_remote_decode": True, "remote_block_ids": [[1]]})
        assert orjson.loads(pushed.body)["kv_transfer_params"] is None


async def test_an_encoder_tells_each_item_once() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "x"}, "uuid": uuid} for uuid in ("a", "b", "a")]
    async with Engine("encode") as engine:
        answer = await post(engine, stream=True, messages=[{"role": "user", "content": parts}])
        entries = orjson.loads(answer.body)["ec_transfer_params"]
        assert {uuid: entry["item_indices"] for uuid, entry in entries.items()} == {"a": [0, 2], "b": [1]}


@pytest.mark.parametrize(
    ("family", "told"),
    [("vllm", {"a": {"item_indices": [0], "metadata": {"image_grid_thw": [1, 56, 72]}}}), ("ascend", None)],
)
async def test_encoders_of_other_families_tell_less(family: str, told: object) -> None:
    part = {"type": "image_url", "image_url": {"url": "x"}, "uuid": "a"}
    async with Engine("encode", family=family) as engine:
        answer = await post(engine, messages=[{"role": "user", "content": [part]}])
        assert orjson.loads(answer.body).get("ec_transfer_params") == told
        assert engine.counters.received > 100, "bytes are counted"


async def test_prefill_refuses_an_item_without_embedding() -> None:
    content = [{"type": "image_embeds", "image_embeds": {}, "uuid": "a"}]
    async with Engine("prefill") as engine:
        ask = {"messages": [{"role": "user", "content": content}]}
        assert (await post(engine, **ask)).status == 400
        assert served(await post(engine, **ask, ec_transfer_params={"a": {}}), 1) is False  # no tag without a text
        assert (await post(engine, **ask, ec_transfer_params={"a": {}})).status == 200


async def metaserver(answer: Callable[[Request, Connection], None]) -> tuple[asyncio.Server, str]:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(answer, lambda _: None), "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/metaserver"


async def pushed(status: int) -> tuple[Answer, list[Request]]:
    asked: list[Request] = []

    def answer(request: Request, connection: Connection) -> None:
        asked.append(request)
        connection.respond(status, {"said": status})

    server, url = await metaserver(answer)
    async with Engine("decode") as engine:
        got = await post(engine, kv_transfer_params={"metaserver": url}, id="7")
    server.close()
    await server.wait_closed()
    return got, asked


async def test_decode_asks_the_metaserver_before_it_answers() -> None:
    got, asked = await pushed(200)
    assert served(got)
    assert [(request.path, orjson.loads(request.body)["request_id"]) for request in asked] == [
        ("/v1/metaserver", "chatcmpl-7")
    ]


async def test_decode_fails_as_its_prefill_did() -> None:
    got, _ = await pushed(503)
    assert (got.status, orjson.loads(got.body)) == (503, {"said": 503})


async def test_decode_waits_for_its_room() -> None:
    rooms = Rooms()
    async with Engine("prefill", rooms=rooms) as prefill, Engine("decode", rooms=rooms) as decode:
        both = asyncio.gather(post(decode, bootstrap_room=5), post(prefill, bootstrap_room=5))
        one, two = await both
        assert served(one)
        assert served(two, 1)
        assert not await rooms.filled(6, 0.01)


async def test_a_caller_that_leaves_is_counted() -> None:
    pace: Callable[[], Awaitable[None]]
    for pace in (Pace(delay=5.0), Pace(interval=5.0)):
        async with Engine("both", pace) as engine:
            answer = await post(engine, stream=True, leave_after=0.05)
            assert answer.ending is Ending.LEFT
            async with asyncio.timeout(10):
                while not engine.counters.left:
                    await asyncio.sleep(0.005)
            assert (engine.counters.running, len(engine.left_at)) == (0, 1)


@pytest.mark.parametrize("role", ROLES)
async def test_an_engine_introduces_itself_and_takes_its_pace(role: str) -> None:
    async with Engine(role) as engine:
        client = Client(engine.url)
        counters = await client.post("/scripted", b'{"delay":0.5,"interval":0.25}', timeout=10)
        assert orjson.loads(counters.body)["calls"] == 0
        assert engine.pace == Pace(0.5, 0.25)
        reader, writer = await asyncio.open_connection("127.0.0.1", engine.port)
        writer.write(b"GET /info HTTP/1.1\r\n\r\n")
        assert f'"role":"{role}"'.encode() in await reader.readuntil(b"}")
        writer.close()
        client.close()
