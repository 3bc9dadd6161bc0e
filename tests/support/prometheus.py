"""A real Prometheus with the configuration and rules that we ship, only faster, and before other targets."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from bench.scripted.candidates import free_port
from tests.support.waiting import eventually

SHIPPED = Path(__file__).parents[2] / "deploy" / "prometheus"
EVERY = "1s"


class Prometheus:
    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url = url
        self._http = http

    async def get(self, path: str, **asked: str) -> Any:
        """The `data` of an answer of its API."""
        async with self._http.get(f"{self.url}/api/v1/{path}", params=asked) as answer:
            told = await answer.json()
        assert told["status"] == "success", f"{asked}: {told}"
        return told["data"]

    async def ask(self, query: str) -> list[tuple[dict[str, str], float]]:
        """(labels, value) of each series that a PromQL expression has now; those that are no number are left out."""
        found = (await self.get("query", query=query))["result"]
        values = [(series["metric"], float(series["value"][1])) for series in found]
        return [(labels, value) for labels, value in values if not math.isnan(value)]


@asynccontextmanager
async def prometheus(program: str, folder: Path, targets: Sequence[str]) -> AsyncIterator[Prometheus]:
    """One that has seen all of `targets`, host and port, up."""
    configuration = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
    configuration["global"] = {"scrape_interval": EVERY, "evaluation_interval": EVERY}
    configuration["scrape_configs"][0]["static_configs"] = [{"targets": list(targets)}]
    configuration["rule_files"] = [str(SHIPPED / name) for name in configuration["rule_files"]]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    address = f"127.0.0.1:{free_port()}"
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"),
            f"--web.listen-address={address}",
            stderr=log,
        )
        try:
            async with aiohttp.ClientSession() as http:
                found = Prometheus(f"http://{address}", http)

                async def up() -> bool:
                    assert process.returncode is None, (folder / "log").read_text()
                    try:
                        return len(await found.ask('up{job="triptych"} == 1')) == len(targets)
                    except aiohttp.ClientError:
                        return False

                await eventually(up, 30)
                yield found
        finally:
            process.terminate()
            await process.wait()
