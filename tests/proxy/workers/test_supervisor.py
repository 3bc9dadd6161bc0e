"""Several workers as processes behind one port: one truth, no trace of the dead, nothing left at the end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from proxy.workers.supervisor import reserve
from tests.fakes.media import chat
from tests.fakes.native import Decode, Language, Prefill
from tests.support.crowd import crowd, running
from tests.support.waiting import eventually, until


async def test_a_killed_worker_gives_its_load_back_and_is_replaced(tmp_path: Path) -> None:
    async with Language() as engine, crowd(tmp_path, 3, "--decode-servers-urls", engine.url) as proxy:
        gate = engine.gate = asyncio.Event()
        asking = [asyncio.create_task(proxy.chat(chat())) for _ in range(24)]
        await engine.until(lambda: engine.running == 24)
        assert await proxy.leases() == 24
        before = proxy.workers()
        os.kill(before[1], signal.SIGKILL)
        await eventually(lambda: _true(engine.aborted > 0))

        async def given_back() -> bool:
            return await proxy.leases() == engine.running == 24 - engine.aborted

        await eventually(given_back)
        await until(lambda: len(proxy.workers()) == 3)
        assert set(before) - set(proxy.workers()) == {before[1]}
        assert (await proxy.metrics())[("triptych_requests_in_flight",)] == 24 - engine.aborted
        gate.set()
        statuses = await asyncio.gather(*asking)
        assert statuses.count(0) == engine.aborted
        assert statuses.count(200) == 24 - engine.aborted, "the others' requests are served"
        assert [await proxy.chat(chat()) for _ in range(12)] == [200] * 12
        metrics = await proxy.metrics()
        assert metrics["triptych_requests_total", "PD", "200"] == statuses.count(200) + 12
        assert metrics["triptych_load_tokens", engine.netloc, "both"] == await proxy.leases() == 0


async def test_counters_survive_every_worker(tmp_path: Path) -> None:
    async with Language() as engine, crowd(tmp_path, 2, "--decode-servers-urls", engine.url) as proxy:
        served = 0
        for victim in proxy.workers():
            assert [await proxy.chat(chat()) for _ in range(8)] == [200] * 8
            served += 8
            await eventually_equal(proxy, served)  # a request is counted a moment after its answer has gone out
            os.kill(victim, signal.SIGKILL)
            await until(lambda victim=victim: len(proxy.workers()) == 2 and victim not in proxy.workers())  # type: ignore[misc]

            async def served_again() -> bool:
                return await proxy.chat(chat()) == 200

            await eventually(served_again)
            served += 1
            found = await eventually_equal(proxy, served)
            assert found["triptych_e2e_seconds_count",] == found["triptych_ttft_seconds_count",] == served
        engine.healthy = False
        await proxy.states("DOWN")  # whoever probed is dead by now


async def eventually_equal(proxy: Any, served: int) -> dict[tuple[str, ...], float]:
    """The metrics, which any worker tells the same."""
    found: list[dict[tuple[str, ...], float]] = []

    async def same() -> bool:
        try:
            found.append(await proxy.metrics())
        except aiohttp.ClientError:
            return False  # the kernel dealt ports anew for a worker that began
        return found[-1]["triptych_requests_total", "PD", "200"] == served

    await eventually(same)
    return found[-1]


async def _true(value: bool) -> bool:
    return value


async def test_workers_balance_as_one(tmp_path: Path) -> None:
    """Requests one after the other, over whichever worker: no engine is ever two ahead of another."""
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(Language()) for _ in range(4)]
        urls = ",".join(engine.url for engine in engines)
        proxy = await stack.enter_async_context(crowd(tmp_path, 3, "--decode-servers-urls", urls))
        gate = asyncio.Event()
        for engine in engines:
            engine.gate = gate
        asking = []
        for number in range(1, 33):
            asking.append(asyncio.create_task(proxy.chat(chat())))
            await until(lambda number=number: sum(engine.running for engine in engines) == number)  # type: ignore[misc]
            counts = [engine.running for engine in engines]
            assert max(counts) - min(counts) <= 1, counts
        assert {shown["leases"] for shown in (await proxy.instances()).values()} == {8}
        gate.set()
        assert await asyncio.gather(*asking) == [200] * 32


async def test_round_robin_takes_turns_over_workers(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(Language()) for _ in range(3)]
        urls = ",".join(engine.url for engine in engines)
        argv = ("--decode-servers-urls", urls, "--policy", "round_robin")
        proxy = await stack.enter_async_context(crowd(tmp_path, 2, *argv))
        for turns in range(1, 9):
            assert [await proxy.chat(chat()) for _ in engines] == [200] * 3
            assert [len(engine.calls) for engine in engines] == [turns] * 3


@pytest.mark.parametrize("public", [False, True])
async def test_fifty_callbacks_reach_the_worker_that_waits(tmp_path: Path, public: bool) -> None:
    """At the workers' own address; and under a public URL whose owner passes on no query, so that workers must ask."""
    async with AsyncExitStack() as stack:
        prefill, decode = await stack.enter_async_context(Prefill()), await stack.enter_async_context(Decode())
        argv = ["--prefill-servers-urls", prefill.url, "--decode-servers-urls", decode.url]
        front = await stack.enter_async_context(Front()) if public else None
        if front is not None:
            argv += ["--metaserver-url", front.url]
        proxy = await stack.enter_async_context(crowd(tmp_path, 3, *argv))
        if front is not None:
            front.leads_to = f"{proxy.url}/v1/metaserver"
            front.http = proxy.http
        statuses = await asyncio.gather(*(proxy.chat(chat()) for _ in range(50)))
        assert statuses == [200] * 50
        assert decode.callbacks == [(200, {"status": "ok"})] * 50
        assert {call.id for call in prefill.calls} == {call.id for call in decode.calls}
        named = {call.body["kv_transfer_params"]["metaserver"].partition("?")[2] for call in decode.calls}
        assert named == {"worker=0", "worker=1", "worker=2"}
        status, answer = await proxy.post("/v1/metaserver", {"request_id": "chatcmpl-nobody"})
        assert (status, answer["error"]["code"]) == (404, "not_found")


class Front:
    """A public address before the proxy."""

    leads_to: str
    http: Any

    async def __aenter__(self) -> Front:
        app = web.Application()
        app.router.add_post("/callbacks", self._pass_on)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/callbacks"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _pass_on(self, request: web.Request) -> web.Response:
        async with self.http.post(self.leads_to, data=await request.read()) as response:
            return web.Response(status=response.status, body=await response.read(), content_type="application/json")


async def test_what_an_admin_changes_is_so_for_all_workers_at_once(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        first, late = [await stack.enter_async_context(Language()) for _ in range(2)]
        proxy = await stack.enter_async_context(crowd(tmp_path, 3, "--decode-servers-urls", first.url))
        status, _ = await proxy.post("/instances", {"role": "both", "url": late.url})
        assert status == 200
        assert all([late.url in await proxy.instances() for _ in range(12)])
        await proxy.states("READY")
        assert [await proxy.chat(chat()) for _ in range(12)] == [200] * 12
        assert (len(first.calls), len(late.calls)) == (6, 6)

        gate = first.gate = asyncio.Event()
        asking = [asyncio.create_task(proxy.chat(chat())) for _ in range(2)]
        await first.until(lambda: first.running == 1)
        assert (await proxy.post("/instances/drain", {"url": first.url}))[1]["draining"]
        assert {(await proxy.instances())[first.url]["state"] for _ in range(12)} == {"DRAINING"}
        calls = len(first.calls)
        assert [await proxy.chat(chat()) for _ in range(12)] == [200] * 12
        assert len(first.calls) == calls
        gate.set()
        assert await asyncio.gather(*asking) == [200] * 2

        async def left() -> bool:
            return first.url not in await proxy.instances()

        await eventually(left)
        async with proxy.http.delete(f"{proxy.url}/instances", params={"url": late.url}) as response:
            assert response.status == 200
        assert [await proxy.instances() for _ in range(12)] == [{}] * 12
        assert {await proxy.chat(chat()) for _ in range(12)} == {503}


async def test_a_worker_that_comes_later_knows_what_was_changed_before(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        first, late = [await stack.enter_async_context(Language()) for _ in range(2)]
        proxy = await stack.enter_async_context(crowd(tmp_path, 2, "--decode-servers-urls", first.url))
        await proxy.post("/instances", {"role": "both", "url": late.url})
        await proxy.states("READY")
        before = proxy.workers()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        await until(lambda: len(set(proxy.workers()) - set(before)) == 2)

        async def known() -> bool:
            try:
                return len(await proxy.instances()) == 2
            except aiohttp.ClientError:
                return False

        await eventually(known)
        await proxy.states("READY")


async def test_sigterm_lets_requests_end_in_every_worker(tmp_path: Path) -> None:
    async with Language() as engine, crowd(tmp_path, 2, "--decode-servers-urls", engine.url) as proxy:
        gate = engine.gate = asyncio.Event()
        asking = [asyncio.create_task(proxy.chat(chat())) for _ in range(12)]
        await engine.until(lambda: engine.running == 12)
        stopping = asyncio.create_task(proxy.stop())

        async def refused() -> bool:
            try:
                await proxy.get("/health")
            except aiohttp.ClientError:
                return True
            return False

        await eventually(refused)
        gate.set()
        assert await asyncio.gather(*asking) == [200] * 12
        assert await stopping == 0


async def test_workers_end_with_a_supervisor_that_was_killed(tmp_path: Path) -> None:
    async with Language() as engine, crowd(tmp_path, 2, "--decode-servers-urls", engine.url) as proxy:
        workers = proxy.workers()
        assert len(list(tmp_path.iterdir())) == 1
        proxy.process.kill()
        await proxy.process.wait()
        await until(lambda: not any(running(pid) for pid in workers))


async def test_a_port_that_another_proxy_has_is_not_shared_with_it(tmp_path: Path) -> None:
    async with Language() as engine, crowd(tmp_path, 2, "--decode-servers-urls", engine.url) as proxy:
        port = proxy.url.rpartition(":")[2]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", "--host", "127.0.0.1", "--port", port, "--workers", "2"),
            *("--decode-servers-urls", engine.url),
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(30):
            _, err = await process.communicate()
        assert process.returncode == 1
        assert f"cannot listen on 127.0.0.1:{port}" in err.decode()
        assert await proxy.chat(chat()) == 200


def test_a_port_is_reserved_for_every_family() -> None:
    held = reserve("", 0)
    try:
        ports = {sock.getsockname()[1] for sock in held}
        assert len(ports) == 1
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            other.bind(("127.0.0.1", ports.pop()))
            other.listen()
            with pytest.raises(OSError, match="in use"):
                reserve("127.0.0.1", other.getsockname()[1])
    finally:
        for sock in held:
            sock.close()


SCRIPT = """
import os, sys, time
from proxy.workers.crew import Crew
from proxy.workers.supervisor import Supervisor
crew = Crew.create(2)

def work(seat):
    marks = os.open(sys.argv[1], os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(marks, str(seat.worker).encode())
    if sys.argv[2] == "never" and seat.worker == 1:
        raise RuntimeError("no luck")
    seat.ready()
    if sys.argv[2] == "young" and seat.worker == 1:
        while os.fstat(marks).st_size < 2: time.sleep(0.01)
        os._exit(3)
    os.read(seat._life, 1)

status = Supervisor(crew, 0, work, lambda: print("READY", flush=True), lambda: 0.5).run()
crew.remove()
sys.exit(status)
"""


def supervised(folder: Path, how: str) -> tuple[subprocess.Popen[str], Path]:
    marks = folder / "marks"
    argv = [sys.executable, "-c", SCRIPT, str(marks), how]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), marks


def test_a_worker_that_cannot_start_ends_the_command(tmp_path: Path) -> None:
    process, _ = supervised(tmp_path, "never")
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert "worker 1 cannot start" in err and "no luck" in err


async def test_a_worker_that_always_dies_young_is_not_restarted_without_end(tmp_path: Path) -> None:
    process, marks = supervised(tmp_path, "young")
    try:
        await until(lambda: marks.exists() and marks.read_text().count("1") >= 4)
        assert marks.read_text().count("0") == 1
        process.terminate()
        _, err = process.communicate(timeout=20)
        delays = [line.rpartition("begins in ")[2] for line in err.splitlines() if "begins in" in line]
        assert delays[:3] == ["0.0 s", "0.2 s", "0.4 s"]
    finally:
        process.kill()
        process.communicate()
