"""The scene that pictures are taken of is a real one: engines, proxy and clients as processes and sockets."""

from __future__ import annotations

import asyncio
from typing import Any

from bench.screens import PACES, Scene
from deploy.asking import told
from tests.support.waiting import eventually


async def test_clients_are_served_and_engines_have_moods_and_mishaps() -> None:
    scene = Scene(counts={"encode": 2, "prefill": 1, "decode": 1})
    async with scene.running(workers=1, port=0):
        assert scene.engines.keys() == PACES.keys()
        unlucky = scene.engines["encode"][1]

        async def state() -> dict[str, Any]:
            return await asyncio.to_thread(told, scene.url, "/ui/state", "requests")

        async def served() -> bool:
            return {one["path"] for one in (await state())["requests"] if one["status"] == 200} == {"P-D", "E-P-D"}

        async def dead() -> bool:
            return any(one["state"] == "DOWN" and one["url"] == unlucky.url for one in (await state())["instances"])

        playing = asyncio.create_task(scene.play(1.0))
        await eventually(served)
        await eventually(dead)
        assert unlucky.returncode is not None and not playing.done()
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)
