"""The terminal's frame from a real proxy's word, in all sizes and in trouble; and the command at a real terminal."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import sys
from typing import Any

import pytest
from rich.console import Console

from deploy import top
from deploy.asking import told
from tests.fakes.deployment import deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, image, part


def drawn(state: top.State, width: int = 120, height: int = 40, lost: str = "") -> list[str]:
    """The lines of a frame, as a terminal of this size has them."""
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(top.frame(state, width, height, lost))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.rstrip("\n").split("\n")


async def looked() -> tuple[dict[str, Any], list[str]]:
    """What a proxy tells after three requests, and its engines."""
    async with deployment("2e1p1d") as d:
        await d.post(chat(part(image()), part(image(9, 9)), stream=True))
        await d.post(chat(stream=True))
        d.prefills[0].fail(Fault(Kind.STATUS, status=400))
        await d.post(chat())
        await d.settle()
        return await asyncio.to_thread(told, d.url, "/ui/state", "curves"), [engine.netloc for engine in d.engines]


async def test_a_frame_has_fleet_requests_and_plan() -> None:
    state, engines = await looked()
    lines = drawn(state)
    text = "\n".join(lines)
    assert "Triptych  tiny  1 worker  version 0." in lines[0] and lines[0].rstrip().endswith("● serving")
    assert all(f"● {engine}" in text for engine in engines)
    assert "Encode  2 engines" in text and "Decode  1 engine, " in text
    latest = next(number for number, line in enumerate(lines) if line.strip().startswith("path"))
    paths = [line.split()[0] for line in lines[latest + 1 : latest + 4]]
    assert paths == ["P-D", "P-D", "E-P-D"], "the latest first"
    assert "400 " in lines[latest + 1] and "2 items, " in lines[latest + 3] and "━" in lines[latest + 3]
    assert "gives way first; advised are 1:1:1" in lines[-1]


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("height", [12, 24, 60])
async def test_it_fits_into_any_terminal(width: int, height: int) -> None:
    state, _ = await looked()
    fleet = [{**one, "url": f"http://10.0.0.{n}:8001"} for one in state["instances"] for n in range(30)]
    lines = drawn({**state, "instances": fleet, "requests": state["requests"] * 30}, width, height)
    assert all(len(line) <= width for line in lines)
    assert len(lines) <= max(height, 17), "below that there is nothing left to leave out"
    assert height < 20 or any("more" in line for line in lines)


async def test_trouble_comes_first() -> None:
    state, engines = await looked()
    first, second, prefill, decode = state["instances"]
    first = {**first, "leases": 3, "load": 9000}
    fleet = [first, {**second, "state": "DOWN"}, {**prefill, "circuit": "HALF_OPEN"}, {**decode, "state": "DRAINING"}]
    lines = drawn({**state, "instances": fleet, "ready": False})
    assert lines[0].rstrip().endswith("● cannot serve")
    row = next(line for line in lines if engines[1] in line)
    assert row.index(f"● {engines[1]}") == 1 and "down" in row and "circuit half-open" in row and "draining" in row
    below = lines[lines.index(row) + 1].split()
    assert below[1] == engines[0] and set(below[2]) == {"━"} and below[3] == "3"


async def test_who_does_not_answer_any_more_is_said_above_the_last_frame() -> None:
    state, engines = await looked()
    lines = drawn(state, lost="http://x answered 503: stopping")
    assert "http://x answered 503: stopping" in lines[0] and any(engines[0] in line for line in lines)


async def test_before_any_request_there_is_a_frame_too() -> None:
    async with deployment("1b") as d:
        state = await asyncio.to_thread(told, d.url, "/ui/state", "curves")
    lines = drawn(state)
    assert "no plan: nothing is offered" in lines[-1] and any("Prefill + decode" in line for line in lines)


async def test_once_prints_a_frame(capsys: pytest.CaptureFixture[str]) -> None:
    async with deployment("1b") as d:
        assert await asyncio.to_thread(top.main, ["--url", d.url, "--once"]) == 0
    assert "Triptych" in capsys.readouterr().out


def test_a_proxy_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert top.main(["--url", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.startswith("triptych top: http://127.0.0.1:9/ui/state: ")


async def test_at_a_terminal_it_goes_on_until_q_is_pressed() -> None:
    async with deployment("1b") as d:
        ours, theirs = pty.openpty()
        command = (sys.executable, "-m", "deploy.top", "--url", d.url, "--interval", "0.05")
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
        process = await asyncio.create_subprocess_exec(
            *command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
        )
        os.close(theirs)
        try:
            shown = b""
            async with asyncio.timeout(30):
                while shown.count(b"Triptych") < 3:  # it draws again and again
                    shown += await asyncio.to_thread(os.read, ours, 1 << 16)
                os.write(ours, b"xq")
                while process.returncode is None:
                    try:
                        await asyncio.to_thread(os.read, ours, 1 << 16)
                    except OSError:  # its end of the terminal is closed
                        await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            os.close(ours)
        assert process.returncode == 0


async def test_a_fleet_of_nobody_is_drawn_too() -> None:
    state, _ = await looked()
    switch = {"url": "http://d:1", "from": "decode", "to": "prefill", "would_carry": 9.0}
    lines = drawn({**state, "instances": [], "ready": False, "plan": {**state["plan"], "switch": switch}}, 140)
    assert "● cannot serve" in lines[0] and "gives way first" in lines[-1] and "; d:1 should be prefill" in lines[-1]
