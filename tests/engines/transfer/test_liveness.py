import asyncio
import os
import signal
import socket
import subprocess
import sys

import msgspec
import pytest

from engines.transfer.liveness import Deaths, here, port_refuses, process_over, started
from engines.transfer.tasks import Tasks
from tests.support.waiting import until


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def address_of(pid):
    return msgspec.structs.replace(here("127.0.0.1", 1), pid=pid, started=started(pid))


def test_this_process_lives_and_has_a_nonce_per_life():
    one, two = here("127.0.0.1", 1), here("127.0.0.1", 1)
    assert not process_over(one)
    assert one.nonce != two.nonce
    assert one.pid == os.getpid()


def test_a_stopped_process_is_not_over_and_a_killed_one_is_even_as_a_zombie(sleeper):
    address = address_of(sleeper.pid)
    sleeper.send_signal(signal.SIGSTOP)
    assert not process_over(address)
    sleeper.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie
    assert process_over(address)
    sleeper.wait()
    assert process_over(address)


def test_a_reused_pid_is_another_life(sleeper):
    address = address_of(sleeper.pid)
    assert process_over(msgspec.structs.replace(address, started=address.started - 1))


def test_pids_of_another_machine_or_namespace_prove_nothing():
    assert not process_over(msgspec.structs.replace(here("127.0.0.1", 1), machine="other", pid=2**22 + 1))


async def test_a_port_refuses_only_when_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = here("127.0.0.1", server.getsockname()[1])
        assert not await port_refuses(address, 2)
    assert await port_refuses(address, 2)


async def test_elsewhere_a_refused_connection_is_the_proof():
    tasks = Tasks()
    deaths = Deaths(tasks, 2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        alive = msgspec.structs.replace(here("127.0.0.1", server.getsockname()[1]), machine="other")
        assert not deaths.over(alive)
        await until(lambda: len(tasks) == 0)
        assert not deaths.over(alive)
    dead = msgspec.structs.replace(alive, nonce="0" * 32)
    assert not deaths.over(dead)
    await until(lambda: deaths.over(dead))
    deaths.retain(set())
    assert not deaths.over(dead)
    await tasks.close()


async def test_what_somebody_else_proved_is_believed():
    deaths = Deaths(Tasks(), 1)
    address = here("127.0.0.1", 1)
    assert not deaths.over(address)
    deaths.note(address)
    assert deaths.over(address)
    await asyncio.sleep(0)
