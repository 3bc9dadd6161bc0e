"""`triptych check`: what it finds of scripted engines, what it prints, how it ends."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from bench.scripted.names import naming
from proxy import check
from proxy.settings import Sources
from tests.fakes.native import Encoder, Language, Prefill


class Shared(Encoder):
    """Publishes by shared memory."""

    async def _info(self, request: web.Request) -> web.Response:
        info = {"engine": "triptych", "version": "0", "role": self.role, "model": "tiny", "transfer": {"name": "shm"}}
        return web.json_response(info)


class Pulling(Language):
    """Reads by Mooncake, and serves another model."""

    async def _info(self, request: web.Request) -> web.Response:
        info = {"engine": "triptych", "version": "0", "role": self.role, "model": "m", "transfer": {"name": "mooncake"}}
        return web.json_response(info)


async def checked(*argv: str) -> list[check.Finding]:
    return await check.findings(Sources.of(argv))


def of(found: Sequence[check.Finding], what: str) -> list[tuple[str, str]]:
    return [(finding.verdict, finding.said) for finding in found if finding.what == what]


async def test_a_fleet_that_is_well_is_said_to_serve() -> None:
    async with Encoder() as encoder, Language() as engine:
        found = await checked("--encode-servers-urls", encoder.url, "--decode-servers-urls", engine.url)
        assert of(found, f"encode {encoder.netloc}") == [("well", "native, version 0, model tiny")]
        assert of(found, f"both {engine.netloc}") == [("well", "native, version 0, model tiny")]
        assert of(found, "fleet") == [("well", "every kind of request can be served")]
        assert ("note", "whoever reaches the proxy may change the fleet") in of(found, "security")


async def test_what_would_fail_is_said_with_what_to_do() -> None:
    async with Shared() as encoder, Pulling() as engine, Prefill() as misplaced:
        dead = Language()
        await dead.start()
        await dead.stop()
        lists = f"{engine.url},{dead.url},{misplaced.url}"
        found = await checked("--encode-servers-urls", encoder.url, "--decode-servers-urls", lists)
    ((verdict, said),) = of(found, f"both {dead.netloc}")
    assert verdict == "fails" and "refused" in said
    assert (
        next(finding for finding in found if dead.netloc in finding.what).advice
        == "start it, or mend its host and port"
    )
    ((verdict, said),) = of(found, f"both {misplaced.netloc}")
    assert verdict == "fails" and "started with the role 'prefill'" in said
    assert [said.partition(":")[0] for verdict, said in of(found, "fleet") if verdict == "fails"] == [
        "engines serve different models",
        "engines hand over by different transports",
    ]


async def test_names_are_looked_up_and_what_is_behind_them_is_asked() -> None:
    async with Language() as engine, naming() as names:
        names.records["llm.test", "A"] = ["127.0.0.1"]
        name, nobody = (f"dns+http://{host}:{engine.port}" for host in ("llm.test", "nobody.test"))
        found = await checked("--decode-servers-urls", f"{name},{nobody}", "--dns-server", names.address)
    assert of(found, name) == [("well", engine.netloc)]
    assert of(found, f"both {engine.netloc}") == [("well", "native, version 0, model tiny")]
    ((verdict, _),) = of(found, nobody)
    assert verdict != "well"


async def test_files_are_judged_before_any_engine_is_asked(tmp_path: Path) -> None:
    file = tmp_path / "proxy.yaml"
    file.write_text("decode-servers-urls: [http://127.0.0.1:9]\napi-keys: /nowhere\n")
    ((verdict, said),) = of(await checked("--config", str(file)), "settings")
    assert verdict == "fails" and "--api-keys: /nowhere" in said
    file.write_text("decode-servers-urls: [http://127.0.0.1:9]\nport: x\n")
    (found,) = await checked("--config", str(file))
    assert found.said.startswith(f"{file}:2: port: ")


async def test_folders_that_media_may_be_in_must_be_there(tmp_path: Path) -> None:
    async with Language() as engine:
        roots = f"{tmp_path},/nowhere"
        found = await checked("--decode-servers-urls", engine.url, "--media-roots", roots)
    assert [verdict for verdict, _ in of(found, "media roots")] == ["well", "fails"]


@pytest.mark.parametrize("well", [True, False])
async def test_programs_get_json_and_a_status(well: bool) -> None:
    async with Language() as engine:
        engine.healthy = well
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy.check", "--json", "--decode-servers-urls", engine.url),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(60):
            out, err = await process.communicate()
    told = json.loads(out)
    assert (told["ok"], process.returncode, err) == (well, 0 if well else 1, b"")
    assert {"what", "verdict", "said", "advice"} == told["findings"][0].keys()


def test_people_get_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = [
        check.Finding("fleet", check.Verdict.WELL, "every [kind]"),
        check.Finding("both h:1", check.Verdict.FAILS, "refused", "start it"),
    ]
    monkeypatch.setenv("COLUMNS", "120")
    check._show(shown, failed=True)
    out = capsys.readouterr().out
    assert "fleet" in out and "every [kind]" in out and "start it" in out and "1 of 2 fail" in out
    check._show(shown[:1], failed=False)
    assert "a proxy with these flags serves" in capsys.readouterr().out
