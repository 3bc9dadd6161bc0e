from __future__ import annotations

import asyncio
import socket
import threading

import pytest

from engines.language.parallel.messages import Answered, Asked, Ping, Said
from engines.language.parallel.wire import Line, Wire


def wires(timeout: float | None = 5.0) -> tuple[Wire, Wire]:
    ours, theirs = socket.socketpair()
    return Wire(ours, timeout), Wire(theirs, timeout)


def test_messages_keep_their_order_and_size() -> None:
    ours, theirs = wires()
    large = bytes(range(256)) * 40_000  # more than a socket holds
    sending = threading.Thread(target=lambda: [ours.send(message) for message in (b"one", large, b"")])
    sending.start()
    assert [theirs.receive() for _ in range(3)] == [b"one", large, b""]
    sending.join()
    ours.close()
    theirs.close()


def test_an_end_that_is_gone_is_the_end() -> None:
    ours, theirs = wires()
    ours.close()
    with pytest.raises(EOFError):
        theirs.receive()
    with pytest.raises(OSError, match=r".+"):
        theirs.send(b"anything")
    theirs.close()


def test_an_end_that_takes_nothing_is_an_error_in_time() -> None:
    ours, theirs = wires(timeout=0.2)
    with pytest.raises(TimeoutError):
        ours.send(bytes(10 << 20))
    ours.close()
    theirs.close()


@pytest.mark.asyncio
async def test_lines_carry_messages_both_ways_until_one_end_closes() -> None:
    ours, theirs = socket.socketpair()
    asking, answering = await Line[Said].on(ours, Said), await Line[Asked].on(theirs, Asked)
    asking.send(Asked(7, Ping()))
    assert await answering.receive() == Asked(7, Ping())
    answering.send(Answered(7, {"large": "x" * 1_000_000}))
    async with asyncio.timeout(5):
        answered = await asking.receive()
    assert isinstance(answered, Answered)
    assert answered.value == {"large": "x" * 1_000_000}
    answering.close()
    with pytest.raises(EOFError):
        await asking.receive()
    asking.send(Asked(8, Ping()))  # nobody is told: the reader is
    asking.close()
