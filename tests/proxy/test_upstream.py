"""The edge to engines: every way a connection can fail has one of our names, and leaving hangs up."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import pytest

from proxy.core import Instance, Role, Stage
from proxy.errors import Broken, Refused, StageTimeout, Unreachable
from proxy.upstream import Timeouts, Upstream
from tests.fakes.faults import Fault, Kind
from tests.fakes.native import Language

BODY = b'{"messages":[],"stream":false}'
PATH = "/v1/chat/completions"
FIELDS = "x-request-id: id\r\n"


@pytest.fixture
async def engine() -> AsyncIterator[Language]:
    async with Language() as engine:
        yield engine


def upstream(connect: float) -> Upstream:
    return Upstream(Timeouts(connect, 1.0, 1.0, 1.0, 1.0, 1.0))


def instance(engine: Language) -> Instance:
    return Instance(engine.url, Role.DECODE, "native")


async def post(engine: Language, up: Upstream, body: bytes = BODY) -> bytes:
    async with up.post(instance(engine), Stage.DECODE, PATH, body, FIELDS, 10.0) as answer:
        assert answer.header("content-type").startswith("application/json")
        return await answer.read()


async def test_a_body_arrives_as_it_was_sent(engine: Language) -> None:
    async with upstream(5.0) as up:
        assert b"choices" in await post(engine, up)
        padded = BODY + b" " * (3 << 20)
        assert b"choices" in await post(engine, up, padded)
        sent = engine.calls[1].headers
        assert (sent["content-length"], sent["content-type"]) == (str(len(padded)), "application/json")
        assert sent["x-request-id"] == "id" and "accept-encoding" not in sent


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        (Fault(Kind.RESET), Broken, "without an answer"),
        (Fault(Kind.TRUNCATED), Broken, "in the middle of its answer"),
        (Fault(Kind.STATUS, status=418, error="short and stout"), Refused, "short and stout"),
    ],
)
async def test_failures_have_names(engine: Language, fault: Fault, error: type[Exception], says: str) -> None:
    async with upstream(5.0) as up:
        engine.fail(fault)
        with pytest.raises(error, match=says):
            await post(engine, up)


async def test_a_closed_port_is_unreachable(engine: Language) -> None:
    await engine.stop()
    async with upstream(5.0) as up:
        with pytest.raises(
            Unreachable, match=f"the decode engine {engine.netloc} cannot be reached: Connection refused"
        ):
            await post(engine, up)


async def test_a_port_that_accepts_nobody_is_unreachable_in_time() -> None:
    with socket.socket() as server, socket.socket() as first, socket.socket() as second:
        server.bind(("127.0.0.1", 0))
        server.listen(0)  # a queue of one: later connections get no answer to their SYN
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        silent = Instance(f"http://127.0.0.1:{server.getsockname()[1]}", Role.DECODE, "native")
        async with upstream(0.2) as up:
            with pytest.raises(Unreachable, match="did not accept a connection in time"):
                async with up.post(silent, Stage.DECODE, PATH, BODY, FIELDS, 10.0):
                    pass


async def test_leaving_early_hangs_up(engine: Language) -> None:
    async with upstream(5.0) as up:
        engine.fail(Fault(Kind.STALL, after=1))
        streamed = b'{"messages":[],"stream":true}'
        async with up.post(instance(engine), Stage.DECODE, PATH, streamed, FIELDS, 10.0) as answer:
            assert await answer.chunk()
        await engine.until(lambda: engine.aborted == 1)


@pytest.mark.parametrize(("kind", "begun"), [(Kind.HANG, False), (Kind.STALL, True)])
async def test_patience_ends_with_the_stages_name_before_the_head_and_after_it(
    engine: Language, kind: Kind, begun: bool
) -> None:
    async with upstream(5.0) as up:
        engine.fail(Fault(kind, after=1))
        answer = up.post(instance(engine), Stage.PREFILL, PATH, b'{"messages":[],"stream":true}', FIELDS, 0.1)
        with pytest.raises(StageTimeout, match=f"the prefill engine {engine.netloc}") as caught:
            async with answer:
                await answer.read()
        assert caught.value.stage == "prefill" and (answer.status == 200) is begun
        await engine.until(lambda: engine.aborted == 1)


async def test_get_is_small_and_bounded(engine: Language) -> None:
    async with upstream(5.0) as up:
        assert await up.get(instance(engine), "/health", 5.0) == (200, b"{}")


async def test_each_engine_gets_its_own_credential_and_no_other(engine: Language) -> None:
    fields = FIELDS + "authorization: Bearer client\r\nx-other: authorization: kept\r\n"
    alone, named = instance(engine), instance(engine)
    named.secret = "its own"
    async with Upstream(Timeouts(5.0, 1.0, 1.0, 1.0, 1.0, 1.0), "ours") as up:
        for which, key in ((alone, "ours"), (named, "its own")):
            async with up.post(which, Stage.DECODE, PATH, BODY, fields, 10.0) as answer:
                await answer.read()
            assert engine.calls[-1].headers["authorization"] == f"Bearer {key}"
            assert engine.calls[-1].headers["x-other"] == "authorization: kept"
        up.go_by(up.timeouts, None)
        async with up.post(alone, Stage.DECODE, PATH, BODY, fields, 10.0) as answer:
            await answer.read()
        assert engine.calls[-1].headers["authorization"] == "Bearer client"


async def test_probes_bring_the_credential_too(engine: Language) -> None:
    engine.credential = "s3cret"
    async with Upstream(Timeouts(5.0, 1.0, 1.0, 1.0, 1.0, 1.0)) as up:
        one = instance(engine)
        assert (await up.get(one, "/info", 5.0))[0] == 401
        one.secret = "s3cret"
        assert (await up.get(one, "/info", 5.0))[0] == 200


async def test_a_session_is_needed(engine: Language) -> None:
    with pytest.raises(RuntimeError, match="async with"):
        await post(engine, upstream(1.0))
