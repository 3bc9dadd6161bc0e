import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from deploy.processes import Child, StartError
from tests.support.waiting import until

SERVER = """
import signal, sys, time, http.server
if "--stubborn" in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("warming up", file=sys.stderr, flush=True)
if "--fail" in sys.argv: sys.exit("no such model")
if "--silent" in sys.argv: time.sleep(60)
print(file=sys.stderr)
print("READY http://127.0.0.1:" + sys.argv[sys.argv.index("--port") + 1], flush=True)
print("serving", flush=True)
while True: time.sleep(0.05)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "scripted_child.py").write_text(SERVER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "scripted_child"


async def test_a_child_is_ready_when_it_says_so_and_its_lines_reach_the_log(module: str) -> None:
    lines: list[tuple[str, str]] = []
    child = Child("encode-0", module, ["--port", "4321"], lambda name, line: lines.append((name, line)))
    assert await child.start(30) == "http://127.0.0.1:4321"
    assert child.port == 4321
    await until(lambda: ("encode-0", "serving") in lines)
    assert ("encode-0", "warming up") in lines
    assert await child.stop(5) == -signal.SIGTERM
    assert "exited" in repr(child)
    assert await child.stop(5) == -signal.SIGTERM


async def test_a_child_that_ends_early_says_why(module: str) -> None:
    with pytest.raises(StartError, match="no such model"):
        await Child("x", module, ["--port", "0", "--fail"]).start(30)


async def test_a_child_that_stays_silent_is_given_up_and_gone(module: str) -> None:
    child = Child("x", module, ["--port", "0", "--silent"])
    with pytest.raises(StartError, match="not ready after 1 s"):
        await child.start(1)
    assert child.returncode is not None


@pytest.mark.parametrize("state", ["stubborn", "stopped"])
async def test_stop_ends_what_ignores_sigterm_or_is_frozen(module: str, state: str) -> None:
    child = Child("x", module, ["--port", "1", *(["--stubborn"] if state == "stubborn" else [])])
    await child.start(30)
    if state == "stopped":
        child.signal(signal.SIGSTOP)
    code = await child.stop(0.5)
    assert code in (-signal.SIGKILL, -signal.SIGTERM)
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


async def test_a_child_does_not_outlive_a_killed_parent(module: str) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "import asyncio\nfrom deploy.processes import Child\n"
        "async def main():\n"
        f"    child = Child('x', {module!r}, ['--port', '1'])\n"
        "    await child.start(30)\n"
        "    print(child.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())",
        stdout=asyncio.subprocess.PIPE,
    )
    assert parent.stdout is not None
    async with asyncio.timeout(30):
        pid = int(await parent.stdout.readline())
    parent.kill()
    await parent.communicate()
    status = Path(f"/proc/{pid}/status")
    await until(lambda: not status.exists() or "\nState:\tZ" in status.read_text())
