"""The command as a process: it says where it is, serves, and stops cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.media import chat
from tests.fakes.native import Decode, Language, Prefill
from tests.support.command import command, ready
from tests.support.crowd import crowd
from tests.support.tls import Authority
from tests.support.waiting import eventually, until


async def test_the_command_serves_push_on_a_free_port_and_stops_on_sigterm() -> None:
    async with Prefill() as prefill, Decode() as decode, aiohttp.ClientSession() as http:
        argv = ("--prefill-servers-urls", prefill.url, "--decode-servers-urls", decode.url, "--port", "0")
        async with command(*argv) as (process, line):
            word, url = line.split()
            assert word == "READY" and url.startswith("http://127.0.0.1:")
            await ready(http, url)
            async with http.post(f"{url}/v1/chat/completions", json=chat()) as response:
                assert response.status == 200
            assert decode.callbacks[0][0] == 200
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                assert await process.wait() == 0


async def test_sigterm_lets_a_request_end() -> None:
    async with contextlib.AsyncExitStack() as stack:
        engine = await stack.enter_async_context(Language())
        http = await stack.enter_async_context(aiohttp.ClientSession())
        async with command("--decode-servers-urls", engine.url, "--port", "0") as (process, line):
            url = line.split()[1]
            await ready(http, url)
            gate = engine.gate = asyncio.Event()
            asking = asyncio.create_task(http.post(f"{url}/v1/chat/completions", json=chat()))
            await engine.until(lambda: engine.running == 1)
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                while True:  # until it listens no more
                    try:
                        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
                        writer.close()
                        await asyncio.sleep(0.02)
                    except ConnectionError:
                        break
            gate.set()
            async with await asking as response:
                assert response.status == 200 and await response.read()
            assert await process.wait() == 0


async def test_workers_share_an_admin_port_and_certificates(tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    files, context = ca.files("proxy"), ca.trusting()
    connector = aiohttp.TCPConnector(force_close=True, ssl=context)
    async with Language() as engine, aiohttp.ClientSession(connector=connector) as http:
        argv = ("--decode-servers-urls", engine.url, "--host", "127.0.0.1", "--port", "0", "--workers", "2")
        secured = ("--admin-port", "0", "--tls-cert", str(files.cert), "--tls-key", str(files.key))
        async with command(*argv, *secured) as (process, line):
            url = line.split()[1]
            assert url.startswith("https://") and process.stderr is not None
            while "admins are served at" not in (said := (await process.stderr.readline()).decode()):
                pass
            await ready(http, url)
            admin = said.split()[-1]
            for _ in range(8):  # each by either worker
                async with http.get(f"{admin}/instances") as response:
                    assert response.status == 200
                async with http.get(f"{url}/instances") as response:
                    assert response.status == 404
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                assert await process.wait() == 0


async def test_an_address_in_use_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", "--decode-servers-urls", "http://127.0.0.1:9"),
            *("--host", "127.0.0.1", "--port", port),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(30):
            out, err = await process.communicate()
        assert (process.returncode, out) == (1, b"")
        assert f"cannot listen on 127.0.0.1:{port}" in err.decode()
        assert "Traceback" not in err.decode()


async def scraped(http: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """What the proxy tells of its configuration."""
    async with http.get(f"{url}/metrics") as response:
        families = text_string_to_metric_families(await response.text())
    samples = [sample for family in families for sample in family.samples if "_config_" in sample.name]
    return {"".join([s.name.removeprefix("triptych_config_"), *s.labels.values()]): s.value for s in samples}


@pytest.mark.parametrize("workers", [1, 2])
async def test_another_file_is_taken_without_a_word_and_by_a_signal(tmp_path: Path, workers: int) -> None:
    """All workers go by the same, one that comes later too; a bad file changes nothing, and no request is dropped."""
    async with contextlib.AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(Language()) for _ in range(2)]
        file = tmp_path / "proxy.yaml"
        file.write_text(f"decode-servers-urls:\n  - {first.url}\n")
        folder = tmp_path / "workers"
        folder.mkdir()
        proxy = await stack.enter_async_context(crowd(folder, workers, "--config", str(file)))
        gate = first.gate = asyncio.Event()
        asking = [asyncio.create_task(proxy.chat(chat())) for _ in range(8)]
        await first.until(lambda: first.running == 8)

        file.write_text(f"decode-servers-urls:\n  - {second.url}\nmax-body-bytes: 50\n")

        async def moved() -> bool:
            found = await proxy.instances()
            return found.get(second.url, {}).get("state") == "READY" and found[first.url]["state"] == "DRAINING"

        await eventually(moved)

        async def all_refuse(status: int) -> bool:
            return {await proxy.chat(chat()) for _ in range(8 * workers)} == {status}

        await eventually(lambda: all_refuse(413))
        gate.set()
        assert await asyncio.gather(*asking) == [200] * 8

        file.write_text("decode-servers-urls: []\nmax-body-bytes: 60\n")
        proxy.process.send_signal(signal.SIGHUP)

        async def refused() -> bool:
            return (await scraped(proxy.http, proxy.url))["reload_success"] == 0

        await eventually(refused)
        assert second.url in await proxy.instances() and await proxy.chat(chat()) == 413
        if workers > 1:
            before = proxy.workers()
            os.kill(before[0], signal.SIGKILL)
            await until(lambda: len(set(proxy.workers()) - set(before)) == 1)
            await eventually(lambda: all_refuse(413))

        file.write_text(f"decode-servers-urls: ['{second.url}']\n")
        proxy.process.send_signal(signal.SIGHUP)
        await eventually(lambda: all_refuse(200))
        found = await scraped(proxy.http, proxy.url)
        assert (found["reload_success"], found["reloads_totalrefused"]) == (1, 1)
        assert found["reloads_totalok"] >= 2 and found["loaded_timestamp_seconds"] > 1e9


async def test_a_wrong_file_at_the_start_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "proxy.yaml"
    file.write_text("decode-servers-urls: [http://d:1]\n\nmax-queue: many\n")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "--config", str(file)), stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(30):
        _, err = await process.communicate()
    assert process.returncode == 2
    assert f"{file}:3: max-queue: Input should be a valid integer" in err.decode() and "Traceback" not in err.decode()
