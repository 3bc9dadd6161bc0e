"""The channel alone: real sockets, a scripted handler."""

import asyncio
import os
import socket
from contextlib import suppress

import msgspec
import pytest

from engines.transfer.base import GoneError, PeerFailed, PeerUnreachable, TransferTimeout, TransportUnavailable
from engines.transfer.control import Control, PeerReplaced, frame
from engines.transfer.messages import Accepted, Answer, Ask, Peer, Refused, Reply, Request, Revoke, Stopped
from tests.support.waiting import until

QUESTION = Revoke("0" * 32)


async def read_frame(reader):
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))


class Handler:
    def __init__(self):
        self.asked = []
        self.answer = Stopped(settled=True)

    def __call__(self, peer, question):
        self.asked.append((peer, question))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self._later(question) if isinstance(question, Ask) else self.answer

    async def _later(self, question):
        await asyncio.sleep(question.body["wait"])
        if question.body.get("fails"):
            raise GoneError("no such key")
        return Answer(question.body)


@pytest.fixture
async def controls():
    made = []

    async def start(host="127.0.0.1"):
        handler = Handler()
        control = Control(host, host, handler)
        await control.start()
        made.append(control)
        return control, handler

    yield start
    for control in made:
        await control.close()


async def test_a_question_is_answered_and_names_who_asked(controls):
    (one, _), (two, handler) = await controls(), await controls()
    assert await one.request(two.address, QUESTION, timeout=5) == Stopped(settled=True)
    assert handler.asked == [(one.address, QUESTION)]


async def test_ipv6_works_where_the_machine_has_it(controls):
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("no IPv6 here")
    (one, _), (two, _) = await controls("::1"), await controls("::1")
    assert await one.request(two.address, QUESTION, timeout=5) == Stopped(settled=True)


async def test_refusals_and_bugs_of_the_handler_are_answers(controls, caplog):
    (one, _), (two, handler) = await controls(), await controls()
    handler.answer = GoneError("no such key")
    assert await one.request(two.address, QUESTION, timeout=5) == Refused("gone", "no such key")
    handler.answer = ZeroDivisionError("a bug")
    answer = await one.request(two.address, QUESTION, timeout=5)
    assert isinstance(answer, Refused)
    assert "a bug" in caplog.text
    handler.answer = Accepted()
    assert await one.request(two.address, QUESTION, timeout=5) == Accepted()


async def test_what_decides_later_may_refuse_too(controls):
    (one, _), (two, _) = await controls(), await controls()
    answer = await one.request(two.address, Ask({"wait": 0, "fails": True}), timeout=5)
    assert answer == Refused("gone", "no such key")


async def test_a_slow_answer_does_not_hold_up_the_next(controls):
    (one, _), (two, _) = await controls(), await controls()
    slow = asyncio.ensure_future(one.request(two.address, Ask({"wait": 0.5}), timeout=5))
    await asyncio.sleep(0)
    assert await one.request(two.address, QUESTION, timeout=5) == Stopped(settled=True)
    assert not slow.done()
    assert await slow == Answer({"wait": 0.5})


async def test_silence_ends_at_the_deadline(controls):
    (one, _), (two, _) = await controls(), await controls()
    with pytest.raises(TransferTimeout, match="did not answer a Ask within"):
        await one.request(two.address, Ask({"wait": 60}), timeout=0.2)
    assert await one.request(two.address, QUESTION, timeout=5) == Stopped(settled=True)


async def test_another_life_on_the_same_port_is_not_the_peer(controls):
    (one, _), (two, handler) = await controls(), await controls()
    old = msgspec.structs.replace(two.address, nonce="f" * 32)
    with pytest.raises(PeerReplaced, match="restarted"):
        await one.request(old, QUESTION, timeout=5)
    assert handler.asked == []


async def test_a_process_that_is_gone_is_known_at_once(controls):
    one, _ = await controls()
    gone = msgspec.structs.replace(one.address, nonce="f" * 32, started=1)
    with pytest.raises(PeerUnreachable, match=f"process {os.getpid()}"):
        await one.request(gone, QUESTION, timeout=60)


async def test_dropping_a_link_fails_its_questions(controls):
    (one, _), (two, _) = await controls(), await controls()
    waiting = asyncio.ensure_future(one.request(two.address, Ask({"wait": 60}), timeout=60))
    await asyncio.sleep(0.05)
    one.drop(two.address)
    with pytest.raises(PeerUnreachable, match="closed"):
        await waiting
    one.tick()
    assert await one.request(two.address, QUESTION, timeout=5) == Stopped(settled=True)


@pytest.mark.parametrize(
    "message",
    [b"", b"\xc1", os.urandom(64), b"\x80", b"x" * 100000],
    ids=["nothing", "no msgpack", "random", "an empty map", "long"],
)
async def test_garbage_is_dropped_and_its_connection_goes_on(controls, message):
    (one, _), (two, handler) = await controls(), await controls()
    reader, writer = await asyncio.open_connection(two.address.host, two.address.port)
    writer.write(frame(message))
    await until(lambda: two.garbage == 1)
    question = Request(7, two.address.nonce, Peer.of(one.address), QUESTION)
    writer.write(frame(msgspec.msgpack.encode(question)))
    reply = msgspec.msgpack.decode(await read_frame(reader), type=Reply)
    assert reply == Reply(7, two.address.nonce, Stopped(settled=True))
    assert handler.asked == [(one.address, QUESTION)]
    writer.close()


async def test_a_frame_that_is_too_long_ends_its_connection_and_no_other(controls):
    (one, _), (two, _) = await controls(), await controls()
    assert await one.request(two.address, QUESTION, timeout=5) == Stopped(settled=True)
    reader, writer = await asyncio.open_connection(two.address.host, two.address.port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n" + os.urandom(4096))  # its first four bytes are a length of 1.2 GB
    with pytest.raises((asyncio.IncompleteReadError, OSError)):
        await read_frame(reader)
    assert two.garbage == 1
    assert await one.request(two.address, QUESTION, timeout=5) == Stopped(settled=True)
    writer.close()


@pytest.fixture
async def liar(controls):
    """An address at which `said` is answered to everything, and then, if it ends with None, the connection closed."""
    one, _ = await controls()
    servers, serving = [], []

    async def start(*said):
        async def serve(reader, writer):
            serving.append(asyncio.current_task())
            await read_frame(reader)
            writer.writelines(data for data in said if data is not None)
            if None not in said:
                with suppress(OSError):
                    await reader.read()
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        servers.append(server)
        port = server.sockets[0].getsockname()[1]
        return one, msgspec.structs.replace(one.address, port=port, nonce="e" * 32)

    yield start
    for server in servers:
        server.close()
    await one.close()
    await asyncio.gather(*serving)


async def test_garbage_answers_are_dropped_too(liar):
    one, peer = await liar(frame(b"\xff garbage"))
    with pytest.raises(TransferTimeout):
        await one.request(peer, QUESTION, timeout=0.5)
    assert one.garbage == 1


async def test_a_link_that_is_lost_ends_its_questions_at_once_and_the_next_opens_another(liar):
    one, peer = await liar(None)
    for _ in range(2):
        with pytest.raises(PeerFailed, match="was lost"):
            await one.request(peer, QUESTION, timeout=60)
    assert one.garbage == 0


async def test_an_answer_that_is_too_long_ends_the_link(liar):
    one, peer = await liar(b"\xff" * 64)
    with pytest.raises(PeerFailed, match="was lost"):
        await one.request(peer, QUESTION, timeout=60)
    assert one.garbage == 1


async def test_a_port_at_which_nobody_listens_is_known_at_once(controls):
    (one, _), (two, _) = await controls(), await controls()
    await two.close()
    with pytest.raises(PeerUnreachable, match="cannot reach"):
        await one.request(two.address, QUESTION, timeout=60)


async def test_a_peer_that_takes_nothing_is_not_sent_more_than_the_limit(controls, monkeypatch):
    monkeypatch.setattr("engines.transfer.control.MAX_UNSENT", 1 << 20)
    one, _ = await controls()
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        peer = msgspec.structs.replace(one.address, port=deaf.getsockname()[1], nonce="e" * 32)
        large = Ask({"filling": b"x" * (1 << 20)})
        early = await asyncio.gather(*(one.request(peer, large, timeout=0.3) for _ in range(8)), return_exceptions=True)
        assert {type(error) for error in early} == {TransferTimeout, PeerUnreachable}  # those, before it was connected
        late = [asyncio.ensure_future(one.request(peer, large, timeout=0.3)) for _ in range(32)]
        assert PeerUnreachable in {type(error) for error in await asyncio.gather(*late, return_exceptions=True)}
        with pytest.raises(PeerUnreachable, match="takes no more questions"):
            await one.request(peer, large, timeout=5)


async def test_the_wildcard_of_ipv6_takes_ipv4_too(controls):
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    (one, _), (two, _) = await controls(), await controls("::")
    there = msgspec.structs.replace(two.address, host="127.0.0.1")
    assert await one.request(there, QUESTION, timeout=5) == Stopped(settled=True)


async def test_a_host_that_is_not_ours_cannot_be_listened_on():
    with pytest.raises(TransportUnavailable, match=r"cannot listen.*192\.0\.2\.1"):
        await Control("192.0.2.1", "192.0.2.1", Handler()).start()


async def test_a_closed_channel_reaches_nobody(controls):
    (one, _), (two, _) = await controls(), await controls()
    await one.close()
    with pytest.raises(PeerUnreachable, match="closed"):
        await one.request(two.address, QUESTION, timeout=1)
