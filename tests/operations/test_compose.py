"""A compose file walked through without docker: its services as processes of this machine, told what it tells them."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from bench.scripted.candidates import free_port
from deploy.processes import Child
from tests.fakes.media import chat, image
from tests.fakes.media import part as image_part
from tests.support.checkpoints import checkpoint
from tests.support.command import ready

FILE = Path(__file__).parents[2] / "deploy/compose/e-p-d.yaml"
MODULES = {"encoder": "engines.encoder", "language": "engines.language"}
ENGINE = {"host": "127.0.0.1", "transfer_host": "127.0.0.1", "dtype": "float32", "threads": 1}
LEGS = {"encode": "encoder", "prefill": "prefill", "decode": "decode"}
SMALL = {"encoder": {"cache_bytes": "64MiB"}, "language": {"embedding_bytes": "64MiB"}}


@pytest.fixture
def model() -> Path:
    return checkpoint("qwen3_vl")


@pytest.fixture
def services(part: Callable[[str], str], model: Path) -> dict[str, dict[str, Any]]:
    """As docker-compose would start them, with a tiny model and no GPU."""
    told = {"MODELS": str(model.parent), "MODEL": model.name, "DEVICE": "cpu", "KV_BYTES": "64MiB"}
    command = [part("docker-compose"), "--file", FILE, "config"]
    said = subprocess.run(command, capture_output=True, check=True, env=os.environ | told).stdout
    found: dict[str, dict[str, Any]] = yaml.safe_load(said)["services"]
    return found


@pytest.mark.timeout(300)
async def test_its_services_serve_together(services: dict[str, dict[str, Any]], model: Path, tmp_path: Path) -> None:
    ports = {name: free_port() for name in services}

    def child(name: str) -> Child:
        """A service, told by a file what it is told by its environment."""
        kind = services[name].get("command", ["proxy"])[0]
        settings: dict[str, Any] = {
            key.removeprefix("TRIPTYCH_").lower(): re.sub(
                r"//(\w+):8100", lambda found: f"//127.0.0.1:{ports[found[1]]}", value
            )
            for key, value in services[name]["environment"].items()
        }
        if kind == "proxy":
            settings |= {"host": "127.0.0.1", "port": 0, "admin_port": 0}
        else:
            settings |= {**ENGINE, **SMALL[kind], "model": str(model), "port": ports[name]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        return Child(name, MODULES.get(kind, kind), ["--config", str(tmp_path / f"{name}.yaml")])

    async with AsyncExitStack() as stack:
        started = {name: child(name) for name in services}
        async with asyncio.TaskGroup() as starting:
            for one in started.values():
                stack.push_async_callback(one.stop)
                starting.create_task(one.start(240))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        url = started["proxy"].url
        await ready(http, url)
        body = chat(image_part(image(64, 64)), max_tokens=4) | {"model": model.name}
        async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            assert (await answer.json())["usage"]["completion_tokens"] == 4
            legs = [f"{leg}=127.0.0.1:{ports[name]}" for leg, name in LEGS.items()]
            assert answer.headers["x-triptych-route"].split("; ")[:4] == ["E-P-D", *legs]
