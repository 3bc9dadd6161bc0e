"""Shutdown, with requests in flight, and as a real process under signals."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from engines.errors import SetupError
from engines.http import json_response
from engines.serve import running
from engines.settings import EngineSettings


class Toy:
    """An engine with one route that waits until it is told to finish."""

    stage = "prefill"
    role = "both"

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.entered = asyncio.Event()
        self.finish = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.drained = False

    def routes(self) -> Iterable[web.RouteDef]:
        yield web.post("/wait", self.wait)

    def info(self) -> Mapping[str, Any]:
        return {}

    async def check(self) -> None:
        pass

    async def drain(self) -> None:
        self.drained = True

    async def wait(self, _request: web.Request) -> web.Response:
        self.entered.set()
        try:
            await self.finish.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return json_response({})


def settings(**changes: Any) -> EngineSettings:
    return EngineSettings(model=Path("/models/toy"), port=0, **changes)


async def post(url: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.post(url, json={}) as response:
        return response.status, await response.json()


async def test_shutdown_lets_requests_finish_and_refuses_new_ones() -> None:
    toy = Toy()
    server = running(toy, settings(grace=30))
    url = await server.__aenter__()
    async with asyncio.timeout(20):
        request = asyncio.create_task(post(f"{url}/wait"))
        await toy.entered.wait()
        leaving = asyncio.create_task(server.__aexit__(None, None, None))
        await asyncio.sleep(0)
        status, body = await post(f"{url}/wait")
        assert (status, body["error"]["code"], body["error"]["retryable"]) == (503, "shutting_down", True)
        assert not toy.drained
        toy.finish.set()
        assert (await request)[0] == 200
        await leaving
    assert toy.drained


async def test_shutdown_does_not_wait_beyond_the_grace() -> None:
    toy = Toy()
    async with asyncio.timeout(20):
        async with running(toy, settings(grace=0.05)) as url:
            request = asyncio.create_task(post(f"{url}/wait"))
            await toy.entered.wait()
        with pytest.raises(aiohttp.ClientError):
            await request
    assert toy.cancelled.is_set()


async def test_a_taken_port_is_a_setup_error_that_names_the_flag() -> None:
    async with running(Toy(), settings()) as url:
        port = int(url.rsplit(":", 1)[1])
        with pytest.raises(SetupError, match="--port"):
            async with running(Toy(), EngineSettings(model=Path("m"), port=port)):
                pass


PROGRAM = """
import asyncio, sys
from contextlib import asynccontextmanager
from prometheus_client import CollectorRegistry
from engines.errors import Fatal, SetupError
from engines.serve import serve
from engines.settings import EngineSettings

class Toy:
    stage, role, registry = "prefill", "both", CollectorRegistry()
    def routes(self): return []
    def info(self): return {}
    async def check(self): pass
    async def drain(self): pass

@asynccontextmanager
async def build(settings):
    if settings.device == "none":
        raise SetupError("no such device: choose another --device")
    try:
        if settings.device == "slow":
            print("LOADING", flush=True)
            await asyncio.sleep(3600)
        if settings.device == "lost":
            asyncio.get_running_loop().call_later(0.1, asyncio.current_task().cancel)
        yield Toy()
    except asyncio.CancelledError:
        if settings.device == "lost":
            raise Fatal("the device is lost") from None
        raise
    finally:
        print("CLOSED", flush=True)

serve(EngineSettings, lambda settings: build, prog="toy")
"""


def start(*flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, "--model", "toy", "--port", "0", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_cleanly(number: signal.Signals) -> None:
    with start() as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("READY http://127.0.0.1:")
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "CLOSED\n"), err


def test_a_signal_while_starting_ends_the_process_cleanly() -> None:
    with start("--device", "slow") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "LOADING\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "CLOSED\n"), err


def test_what_cannot_start_says_why_without_a_traceback() -> None:
    with start("--device", "none") as process:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    assert err == "toy: no such device: choose another --device\n"


def test_what_cannot_go_on_says_why_without_a_traceback() -> None:
    with start("--device", "lost") as process:
        out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert out.startswith("READY ")
    assert out.endswith("\nCLOSED\n")
    assert err == "toy: the device is lost\n"
