"""Both versions, or those that are named; exits 1 unless all checks pass."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp

from bench.scripted.candidates import free_port
from deploy.processes import Child
from tests.conformance.sglang.checks import CHECKS, MAX_TOKENS, PATIENCE, Check, Fleet
from tests.conformance.sglang.server import ENCODER, FOLDER, LANGUAGE, VERSIONS, Sglang
from tests.conformance.vllm.__main__ import Row, say, table
from tests.support.checkpoints import checkpoint
from tests.support.cluster import Client
from tests.system.cases import CASES

FAMILY = "qwen2_5_vl"  # which 0.5.10 and 0.5.23 both take apart
CHECK_TIMEOUT = 600.0


def language(version: str, name: str, model: Path, encoder: str) -> Sglang:
    options = ("--encoder-urls", encoder)
    if version != "0.5.10":
        options += ("--encoder-bootstrap-port", str(free_port()))
    return Sglang(name, model, version, LANGUAGE + options)


@asynccontextmanager
async def started(*servers: Sglang) -> AsyncIterator[None]:
    try:
        await asyncio.gather(*(server.start() for server in servers))
        yield
    finally:
        await asyncio.gather(*(server.kill() for server in servers))


async def answers(server: Sglang) -> Mapping[str, str]:
    """What a language server with a real encoder says to each case."""
    found = {}
    async with aiohttp.ClientSession() as session:
        for case in CASES:
            client = Client(session, server.url)
            answer = await client.chat(case.content, timeout=PATIENCE, max_tokens=MAX_TOKENS)
            assert answer.status == 200, f"asked directly, {case.name}: {answer.status} {answer.body}"
            found[case.name] = answer.text
    return found


@asynccontextmanager
async def standing(version: str, model: Path) -> AsyncIterator[Fleet]:
    """First a server with a real encoder, to learn what is right; then one whose only encoder is the proxy."""
    encoders = tuple(Sglang(f"encoder-{n}", model, version, ENCODER) for n in range(2))
    port = free_port()
    async with AsyncExitStack() as stack:
        direct = language(version, "direct", model, encoders[0].url)
        behind = language(version, "language", model, f"http://127.0.0.1:{port}")
        await stack.enter_async_context(started(*encoders))
        async with started(direct):
            right = await answers(direct)
        options = ["--model", str(model), "--served-model-name", "tiny", "--port", "0", "--threads", "1", "--sglang"]
        ours = Child("encoder", "engines.encoder", [*options, "--transfer", "zmq"])
        stack.push_async_callback(ours.stop)
        url = await ours.start()
        listed = ",".join(f"sglang+{encoder.url}" for encoder in encoders)
        lists = ["--encode-servers-urls", listed, "--decode-servers-urls", behind.url]
        proxy = Child(
            "proxy", "proxy", ["--port", "0", "--host", "127.0.0.1", "--virtual-encoder-port", str(port), *lists]
        )
        stack.push_async_callback(proxy.stop)
        client = Client(await stack.enter_async_context(aiohttp.ClientSession()), await proxy.start())
        await stack.enter_async_context(started(behind))
        fleet = Fleet(client, behind, encoders, url, right)
        await fleet.states({server.url: "READY" for server in (*encoders, behind)})
        yield fleet


async def row(version: str, name: str, check: Check, fleet: Fleet) -> Row:
    began, failure = time.monotonic(), ""
    try:
        async with asyncio.timeout(CHECK_TIMEOUT):
            await check(fleet)
    except Exception as error:  # whatever it is, it is this check's result
        failure = f"{type(error).__name__}: {error}"
    result = Row(f"SGLang {version}", name, failure, time.monotonic() - began)
    say(result)
    return result


async def rows(version: str, model: Path) -> list[Row]:
    found: list[Row] = []
    began = time.monotonic()
    try:
        async with standing(version, model) as fleet:
            say(f"SGLang {version} stands after {time.monotonic() - began:.0f} s")
            for name, check in CHECKS.items():
                found.append(await row(version, name, check, fleet))
    except Exception as error:  # the other version is checked all the same
        found.append(Row(f"SGLang {version}", "starts", f"{type(error).__name__}: {error}", time.monotonic() - began))
        say(found[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="conformance-sglang", description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", choices=[[], *VERSIONS], help=f"of {', '.join(VERSIONS)}; default: all")
    versions = parser.parse_args().versions or VERSIONS
    began = time.monotonic()
    model = checkpoint(FAMILY)
    found = [row for version in versions for row in asyncio.run(rows(version, model))]
    say(f"\n{table(found)}\n\n{time.monotonic() - began:.0f} s; logs in {FOLDER / 'logs'}")
    sys.exit(any(row.failure for row in found))


if __name__ == "__main__":
    main()
