"""Pictures of the page at /ui and of `triptych top`, from a real proxy that serves a real load.

The engines are scripted ones, whose pace changes as that of busy engines does. Clients leave now and then; an encoder
is killed on the way, comes back, and is killed again in the end. Nothing in a picture is made up. It needs playwright
and Chromium.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import math
import random
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import orjson
from rich.console import Console

from bench.scripted import answers
from bench.scripted.client import Client
from deploy import top
from deploy.asking import told
from deploy.processes import Child

if TYPE_CHECKING:
    from playwright.async_api import Browser

CHROMIUM = Path("/usr/bin/chromium")
PICTURES = Path(__file__).parents[1] / "deploy" / "pictures"
KEY = "a key for pictures"
ENGINES = {"encode": 3, "prefill": 2, "decode": 3}
PACES = {"encode": (0.06, 0.0), "prefill": (0.09, 0.0), "decode": (0.01, 0.014)}  # seconds: delay, between tokens
IMAGES = (0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4)  # of a request, as likely as they stand here
SIZES = ((1024, 768), (1280, 960), (960, 960), (1280, 720))  # of images, in pixels
LEAVES = 0.02  # share of requests whose client hangs up
MOST_TOKENS = 400
TERMINAL = 120, 38  # columns, lines


@dataclass
class Scene:
    """A proxy, its engines, and what clients do to it."""

    counts: Mapping[str, int] = field(default_factory=lambda: dict(ENGINES))
    dice: random.Random = field(default_factory=lambda: random.Random(6))
    engines: dict[str, list[Child]] = field(default_factory=dict)
    url: str = ""
    idle: list[Client] = field(default_factory=list)

    @asynccontextmanager
    async def running(self, workers: int, port: int) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for role, number in self.counts.items():
                delay, interval = PACES[role]
                flags = ["--role", role, "--delay", str(delay), "--interval", str(interval), "--port", "0"]
                own = self.engines[role] = [Child(f"{role}-{n}", "bench.scripted", flags) for n in range(number)]
                for child in own:
                    stack.push_async_callback(child.stop)
            every = [child for own in self.engines.values() for child in own]
            await asyncio.gather(*(child.start(timeout=30) for child in every))
            flags = ["--host", "127.0.0.1", "--port", str(port), "--workers", str(workers), "--log-level", "warning"]
            flags += ["--probe-interval", "1", "--admin-key", KEY]
            for role, children in self.engines.items():
                flags += [f"--{role}-servers-urls", ",".join(child.url for child in children)]
            proxy = Child("proxy", "proxy", flags)
            stack.push_async_callback(proxy.stop)
            self.url = await proxy.start(timeout=30)
            await self._ready()
            yield

    async def _ready(self) -> None:
        """Until the proxy has found its engines."""
        async with asyncio.timeout(30), aiohttp.ClientSession() as http:
            for _ in range(1 << 20):
                async with http.get(f"{self.url}/ready") as answer:
                    if answer.status == 200:
                        return
                await asyncio.sleep(0.1)

    async def play(self, seconds: float) -> None:
        """Clients come, for ever; what happens to fleets happens to this one within so many seconds."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._moods())
            group.create_task(self._mishap(seconds))
            clock = asyncio.get_running_loop().time
            began = clock()
            while True:
                passed = clock() - began
                await asyncio.sleep(self.dice.expovariate(7 + 4 * math.sin(passed / 15) + 2 * math.sin(passed / 4)))
                group.create_task(self._ask())

    async def _ask(self) -> None:
        dice = self.dice
        images = [answers.image(20_000, dice.randrange(60), *dice.choice(SIZES)) for _ in range(dice.choice(IMAGES))]
        tokens = min(MOST_TOKENS, max(4, round(dice.lognormvariate(4.0, 0.7))))
        body = answers.request("x", tokens, stream=True, size=round(dice.uniform(4000, 16000)), images=images)
        client = self.idle.pop() if self.idle else Client(self.url)
        leave = dice.uniform(0.2, 1.0) if dice.random() < LEAVES else None
        await client.post(answers.CHAT, body, timeout=60, leave_after=leave)
        if leave is None:
            self.idle.append(client)
        else:
            client.close()

    async def _moods(self) -> None:
        """Engines are faster and slower by the minute, each in its own way."""
        async with aiohttp.ClientSession() as http:
            for step in range(1 << 20):
                for role, children in self.engines.items():
                    delay, interval = PACES[role]
                    for number, child in enumerate(children):
                        mood = (1 + 0.35 * math.sin(step / 9 + 2 * number)) * self.dice.lognormvariate(0, 0.3)
                        pace = orjson.dumps({"delay": delay * mood, "interval": interval * min(1.6, mood)})
                        with suppress(aiohttp.ClientError):  # it is dead for now
                            async with http.post(f"{child.url}/scripted", data=pace) as answer:
                                await answer.read()
                await asyncio.sleep(0.5)

    async def _mishap(self, seconds: float) -> None:
        """An encoder dies, is back after a while, and dies again."""
        unlucky = self.engines["encode"][1]
        unlucky.keep_port()
        await asyncio.sleep(seconds * 0.55)
        await unlucky.stop(grace=0)
        await asyncio.sleep(seconds * 0.06)
        await unlucky.start(timeout=30)
        await asyncio.sleep(seconds * 0.36)
        await unlucky.stop(grace=0)


async def shoot(browser: Browser, url: str, folder: Path) -> None:
    """The page on a desk and in a hand, by day and by night; and the terminal."""
    for size, (width, height), scale in (("desktop", (1280, 900), 1.5), ("phone", (390, 844), 2)):
        for scheme, place in (("light", "header"), ("dark", "#requests")):
            page = await browser.new_page(
                viewport={"width": width, "height": height},
                device_scale_factor=scale,
                color_scheme="light" if scheme == "light" else "dark",
            )
            await page.goto(f"{url}/ui")
            await page.locator("#requests li").nth(8).wait_for()
            await page.wait_for_timeout(1500)  # what moves has moved
            if size == "phone":
                await page.locator(place).evaluate("(node) => node.scrollIntoView()")
            await page.screenshot(path=folder / f"page-{size}-{scheme}.png", full_page=size == "desktop")
            await page.close()
    state = await asyncio.to_thread(told, url, "/ui/state", "curves")
    console = Console(record=True, width=TERMINAL[0], file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(top.frame(state, *TERMINAL))
    page = await browser.new_page(viewport={"width": 1220, "height": 860}, device_scale_factor=1.5)
    await page.set_content(console.export_svg(title="triptych top"))
    await page.locator("svg").first.screenshot(path=folder / "top.png")


async def run(arguments: argparse.Namespace) -> None:
    from playwright.async_api import async_playwright

    scene = Scene()
    async with scene.running(arguments.workers, arguments.port):
        print(f"{scene.url}/ui for {arguments.seconds:g} s", file=sys.stderr)
        async with asyncio.TaskGroup() as group:
            playing = group.create_task(scene.play(arguments.seconds))
            await asyncio.sleep(arguments.seconds)
            if not arguments.watch:
                async with async_playwright() as player:
                    browser = await player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
                    await shoot(browser, scene.url, arguments.folder)
                    await browser.close()
            playing.cancel()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.screens", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=240.0, help="of load before the pictures are taken")
    parser.add_argument("--folder", type=Path, default=PICTURES, help="where they go (default: deploy/pictures)")
    parser.add_argument("--workers", type=int, default=2, help="of the proxy")
    parser.add_argument("--port", type=int, default=0, help="of the proxy; 0: any")
    parser.add_argument("--watch", action="store_true", help="take none: for who wants to see it with his own eyes")
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    asyncio.run(run(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
