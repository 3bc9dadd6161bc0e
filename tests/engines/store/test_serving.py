"""`triptych store` as users run it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from deploy.processes import Child, StartError
from engines.errors import SetupError
from engines.store import serving
from engines.store.serving import argument_parser, master_command
from tests.support.embedding_store import address, store_server


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_its_master_goes_with_it_whatever_ends_it(number: signal.Signals) -> None:
    async with store_server() as server:
        (master,) = children(server.pid)
        server.signal(number)
        assert await server.wait() == (0 if number is signal.SIGTERM else -number)
        await gone(master)


async def test_it_ends_when_its_master_does_so_that_whoever_watches_it_starts_both_again() -> None:
    async with store_server() as server:
        (master,) = children(server.pid)
        os.kill(master, signal.SIGKILL)
        assert await server.wait() == 1
        assert "the master ended with -9" in server.last_lines


async def test_memory_of_another_machine_joins_a_master() -> None:
    async with store_server() as server:
        more = Child("more", "engines.store", ["--join", address(server), "--bytes", "16MiB"])
        try:
            assert await more.start(30) == server.url
            assert children(more.pid) == []
        finally:
            assert await more.stop() == 0


async def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        store = Child("store", "engines.store", ["--port", str(taken.getsockname()[1]), "--bytes", "16MiB"])
        with pytest.raises(StartError, match="choose another --host or --port"):
            await store.start(30)


def test_sizes_are_written_as_people_write_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        argument_parser().parse_args(["--bytes", "1MiB"])
    assert "less than the 16MiB" in capsys.readouterr().err
    assert argument_parser().parse_args(["--bytes", "64GiB"]).bytes == 64 << 30
    assert argument_parser().parse_args([]).bytes == 4 << 30


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--bytes", "many"], "'many' is no amount of memory"),
        (["--port", "70000"], "'70000' is no port"),
        (["--metrics-port", "-1"], "'-1' is no port"),
        (["--join", "10.0.0.1"], "'10.0.0.1' should look like HOST:PORT"),
        (["--join", "10.0.0.1:x"], "'x' is no port"),
        (["--lease", "-1"], "-1 is no number of seconds"),
        (["--lease", "nan"], "nan is no number of seconds"),
        (["--lease", "soon"], "invalid seconds value: 'soon'"),
    ],
    ids=" ".join,
)
def test_mistakes_are_told(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        argument_parser().parse_args(flags)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_without_the_wheel_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda _: None)
    with pytest.raises(SetupError, match="pip install"):
        master_command("127.0.0.1", 1, 5.0, 0)
