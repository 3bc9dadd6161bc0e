"""The channel alone: real sockets, a scripted handler."""

import asyncio
import os
import socket

import msgspec
import pytest
import zmq
import zmq.asyncio

from engines.transfer.base import GoneError, PeerUnreachable, TransferTimeout, TransportUnavailable
from engines.transfer.control import Control, PeerReplaced
from engines.transfer.messages import Accepted, Answer, Ask, Refused, Revoke, Stopped
from tests.support.waiting import until

QUESTION = Revoke("0" * 32)


class Handler:
    def __init__(self):
        self.asked = []
        self.answer = Stopped(settled=True)

    async def __call__(self, peer, question):
        self.asked.append((peer, question))
        if isinstance(self.answer, Exception):
            raise self.answer
        if isinstance(question, Ask):
            await asyncio.sleep(question.body["wait"])
            return Answer(question.body)
        return self.answer


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
    one.drop_idle()
    assert await one.request(two.address, QUESTION, timeout=5) == Stopped(settled=True)


@pytest.mark.parametrize("frames", [[b""], [b"\xc1"], [os.urandom(64)], [b"\x80"], [b"a", b"b", b"c"], [b"x" * 100000]])
async def test_garbage_is_dropped_and_the_channel_goes_on(controls, frames):
    (one, _), (two, handler) = await controls(), await controls()
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.set(zmq.LINGER, 0)
        stranger.connect(f"tcp://{two.address.host}:{two.address.port}")
        await stranger.send_multipart(frames)
        await until(lambda: two.garbage == 1)
    assert await one.request(two.address, QUESTION, timeout=5) == Stopped(settled=True)
    assert len(handler.asked) == 1


async def test_bytes_that_are_no_zmq_are_dropped(controls):
    (one, _), (two, _) = await controls(), await controls()
    _, writer = await asyncio.open_connection(two.address.host, two.address.port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n" + os.urandom(4096))
    assert await one.request(two.address, QUESTION, timeout=5) == Stopped(settled=True)
    writer.close()


async def test_garbage_answers_are_dropped_too(controls):
    one, _ = await controls()
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as liar:
        liar.set(zmq.LINGER, 0)
        port = liar.bind_to_random_port("tcp://127.0.0.1")
        peer = msgspec.structs.replace(one.address, port=port, nonce="e" * 32)
        asking = asyncio.ensure_future(one.request(peer, QUESTION, timeout=0.5))
        identity, _ = await liar.recv_multipart()
        await liar.send_multipart((identity, b"\xff garbage"))
        with pytest.raises(TransferTimeout):
            await asking
    assert one.garbage == 1


async def test_a_host_that_is_not_ours_cannot_be_listened_on():
    with pytest.raises(TransportUnavailable, match=r"cannot listen.*192\.0\.2\.1"):
        await Control("192.0.2.1", "192.0.2.1", Handler()).start()


async def test_a_closed_channel_reaches_nobody(controls):
    (one, _), (two, _) = await controls(), await controls()
    await one.close()
    with pytest.raises(PeerUnreachable, match="closed"):
        await one.request(two.address, QUESTION, timeout=1)
