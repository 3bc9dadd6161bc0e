"""The page in a real browser, before a real proxy: on a desk and in a hand, by day and by night, with a key and without
one, by keyboard alone."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.async_api import Browser, Page, async_playwright, expect

from bench.screens import shoot
from proxy.core import BOTH
from tests.fakes.deployment import Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, image, part

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
KEY = "the key"

Find = Callable[[str], str]

CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b]
    .map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const found = getComputedStyle(node).backgroundColor;
      if (!/, 0\\)|\\/ 0\\)|transparent/.test(found)) return parse(found);
    }
  };
  const poor = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility() || node.closest(".hidden, .skip, noscript")) continue;
    const style = getComputedStyle(node);
    const ink = parse(node instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(ink), light(ground(node))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.push(`${node.tagName} ${node.textContent.trim().slice(0, 30)}`);
  }
  return poor;
}"""


@asynccontextmanager
async def browser(part: Find) -> AsyncIterator[Browser]:
    async with async_playwright() as player:
        found = await player.chromium.launch(executable_path=part("chromium"), args=["--no-sandbox"])
        try:
            yield found
        finally:
            await found.close()


async def opened(found: Browser, d: Deployment, size: str = "desktop", **options: Any) -> tuple[Page, list[str]]:
    """The page, drawn; and what the browser complains of from now on."""
    width, height = SIZES[size]
    page = await found.new_page(viewport={"width": width, "height": height}, **options)
    page.set_default_timeout(10_000)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith(d.url) else complaints.append(asked.url))
    await page.goto(f"{d.url}/ui")
    await page.locator("main").wait_for()
    return page, complaints


async def busy(d: Deployment) -> None:
    """Requests of several kinds; one of them fails."""
    for number in range(4):
        await d.post(chat(part(image(64, 32 + number)), part(image(8, 8 + number)), stream=True))
        await d.post(chat(stream=True))
    d.decodes[0].fail(Fault(Kind.STATUS, status=400))
    await d.post(chat(), x_request_id="the-bad-one")
    await d.settle()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
async def test_it_shows_what_there_is(part: Find, size: str, scheme: Any) -> None:
    async with deployment("2e1p1d") as d, browser(part) as found:
        await busy(d)
        page, complaints = await opened(found, d, size, color_scheme=scheme)
        await expect(page.locator("#status")).to_have_text("Serving")
        for engine in d.engines:
            await expect(page.locator("#columns li", has_text=engine.netloc)).to_be_visible()
        assert await page.locator("#columns h3 span").all_inner_texts() == ["Encode", "Prefill", "Decode"]
        rows = page.locator("#requests li")
        await expect(rows).to_have_count(9)
        await expect(rows.nth(0)).to_contain_text("400")
        media = page.locator("#requests li", has_text="E-P-D").first
        for stage in ("encode", "prefill", "decode"):
            await expect(media.locator(f".fall .stage-{stage}").first).to_be_visible()
        await expect(page.locator("#plan")).to_contain_text("gives way first")
        await expect(page.locator("#plan tbody tr")).to_have_count(3)
        await expect(page.locator("#figures")).to_contain_text("in flight")
        # The rates of a span of time are told once it is over.
        await expect(page.get_by_role("img", name=re.compile("^Requests, now: served [0-9.]+"))).to_be_visible()
        await expect(page.locator("#flow figcaption")).to_contain_text("encode to prefill")
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing hangs over the edge"
        assert await page.evaluate(CONTRAST) == [], "everything can be read"
        ground = await page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 380) == (scheme == "light")
        assert complaints == []


async def test_it_is_alive(part: Find) -> None:
    async with deployment("1e1p1d") as d, browser(part) as found:
        page, complaints = await opened(found, d)
        await expect(page.locator("#requests .empty")).to_have_text("No request has ended yet.")
        await expect(page.locator("#plan")).to_contain_text("No advice yet")
        gate = d.decodes[0].gate = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(d.post(chat(stream=True)))
            await d.decodes[0].until(lambda: d.decodes[0].running == 1)
            decode = page.locator("#columns li", has_text=d.decodes[0].netloc)
            await expect(decode).to_contain_text("1 running")
            await expect(page.locator("#figures")).to_contain_text("1 in flight")
            gate.set()
        await expect(page.locator("#requests li")).to_have_count(1)
        await d.encoders[0].stop()
        for _ in range(5):
            await d.proxy.health.tick()
        encoder = page.locator("#columns li", has_text=d.encoders[0].netloc)
        await expect(encoder).to_have_attribute("data-state", "DOWN")
        await expect(encoder).to_contain_text("down: ")
        assert complaints == []


async def test_it_says_when_nobody_answers_and_goes_on_when_somebody_does(part: Find) -> None:
    async with deployment("1b") as d, browser(part) as found:
        page, _ = await opened(found, d)
        await page.context.set_offline(True)
        await expect(page.locator("#status")).to_have_text(re.compile("^No answer"))
        await page.context.set_offline(False)
        await expect(page.locator("#status")).to_have_text("Serving")
        d.proxy.fleet.remove(d.combined[0].url)
        await expect(page.locator("#status")).to_have_text("Cannot serve")


async def test_without_the_key_it_only_looks_and_with_it_engines_are_drained_and_taken_back(part: Find) -> None:
    async with deployment("1e2b", admin_key=KEY) as d, browser(part) as found:
        one = d.combined[0]
        told = {"url": one.url, "role": "both", "labels": {"zone": "z1"}, "weight": 2.5}
        async with d.http.post(f"{d.url}/instances", json=told, headers={"x-api-key": KEY}) as answer:
            assert answer.status == 200
        page, _ = await opened(found, d)
        row = page.locator("#columns li", has_text=one.netloc)
        await expect(row.get_by_role("button")).to_be_hidden()
        await page.get_by_role("button", name="Unlock").click()
        await page.get_by_role("textbox", name="Key").fill("a guess")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("alert")).to_have_text("That is not the admin key.")
        await page.get_by_role("textbox", name="Key").fill(KEY)
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("dialog")).to_be_hidden()
        gate = one.gate = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(d.post(chat(stream=True)))
            await one.until(lambda: one.running > 0)
            await row.get_by_role("button", name="Drain").click()
            assert d.proxy.fleet.get(one.url).state == "READY", "it asks once more"
            await row.get_by_role("button", name="Drain it?").click()
            await expect(row).to_have_attribute("data-state", "DRAINING")
            gate.set()
        one.gate = None
        for _ in range(3):
            await d.proxy.health.tick()
        await expect(row).to_have_attribute("data-state", "GONE")
        await row.get_by_role("button", name="Take back").click()
        await expect(row).not_to_have_attribute("data-state", "GONE")
        await d.proxy.health.tick()
        await expect(row).to_have_attribute("data-state", "READY")
        instance = d.proxy.fleet.get(one.url)
        assert (instance.role, instance.dialect, instance.weight) == (BOTH, "native", 2.5), "it is who it was"
        assert instance.facts["labels"] == {"zone": "z1"}
        assert await page.evaluate("localStorage.length") == 0 and KEY not in page.url
        await page.get_by_role("button", name="Lock", exact=True).click()
        await expect(row.get_by_role("button")).to_be_hidden()
        assert await page.evaluate("sessionStorage.length") == 0


async def test_who_guesses_keys_is_told_to_wait(part: Find) -> None:
    async with deployment("1b", admin_key=KEY) as d, browser(part) as found:
        page, _ = await opened(found, d)
        await page.get_by_role("button", name="Unlock").click()
        told = page.get_by_role("alert")
        async with asyncio.timeout(30):
            while (await told.inner_text()) in ("", "That is not the admin key."):
                await page.get_by_role("textbox", name="Key").fill("a guess")
                async with page.expect_response(f"{d.url}/ui/key"):
                    await page.get_by_role("button", name="Unlock").last.click()
                await expect(told).not_to_be_empty()
        await expect(told).to_contain_text("wrong keys")


async def test_a_receipt_tells_every_leg(part: Find) -> None:
    async with deployment("2e1p1d") as d, browser(part) as found:
        await busy(d)
        page, complaints = await opened(found, d)
        await page.get_by_role("button", name="Failures only").click()
        await expect(page.locator("#requests li")).to_have_count(1)
        await page.locator("#requests li .row").click()
        receipt = page.locator("#requests .receipt")
        await expect(receipt).to_contain_text("the-bad-one")
        await expect(receipt).to_contain_text(re.compile("Errordecode: "))
        await page.get_by_role("button", name="Failures only").click()
        row = page.locator("#requests li", has_text="E-P-D").first
        await row.locator(".row").click()
        await expect(row.locator(".receipt .leg")).to_have_count(4)  # two items went to two encoders
        choices = row.locator(".receipt .choice", has_text="chosen of 2, by when it would be done")
        await expect(choices).to_have_count(2)
        await expect(choices.first.locator("b")).to_have_count(1)
        for engine in d.engines:
            await expect(row.locator(".receipt")).to_contain_text(engine.netloc)
        assert complaints == []


async def test_what_clients_say_stays_text(part: Find) -> None:
    async with deployment("1b") as d, browser(part) as found:
        await d.post(chat() | {"model": "<img src=x onerror=alert(1)>"})
        page, complaints = await opened(found, d)
        await page.locator("#requests li .row").click()
        await expect(page.locator("#requests .receipt")).to_contain_text("<img src=x onerror=alert(1)>")
        assert await page.locator("img, script:not([src])").count() == 0 and complaints == []


async def test_everything_can_be_done_by_keyboard(part: Find) -> None:
    async with deployment("1e1p1d", admin_key=KEY) as d, browser(part) as found:
        await busy(d)
        page, _ = await opened(found, d)
        focused = "document.activeElement"
        await page.keyboard.press("Tab")
        assert await page.evaluate(f"{focused}.textContent") == "Skip to the fleet"
        await page.keyboard.press("Enter")
        assert await page.evaluate(f"{focused}.id") == "fleet"
        await expect(page.get_by_role("img", name=re.compile("^Requests, now"))).to_be_visible()
        await page.locator(".chart svg").first.focus()
        await page.keyboard.press("ArrowLeft")
        await expect(page.get_by_role("img", name=re.compile("^Requests, 2 s ago"))).to_be_focused()
        await page.keyboard.press("Escape")
        await expect(page.get_by_role("img", name=re.compile("^Requests, now"))).to_be_focused()
        for _ in range(3 + 2):  # the other charts, two buttons
            await page.keyboard.press("Tab")
        assert await page.evaluate(f"{focused}.textContent") == "Pause"
        await page.keyboard.press("Tab")
        await page.keyboard.press("Enter")
        await expect(page.locator("#requests .receipt").first).to_be_visible()
        outline = await page.evaluate(f"getComputedStyle({focused}).outlineStyle")
        assert outline == "solid", "one sees where one is"
        names = await page.evaluate(
            "[...document.querySelectorAll('button, input, [role=img]')].filter((node) => node.checkVisibility())"
            ".filter((node) => !(node.ariaLabel || node.textContent.trim() || node.labels?.length)).length"
        )
        assert names == 0, "everything has a name"


async def test_pictures_are_taken_of_it(part: Find, tmp_path: Path) -> None:
    async with deployment("1e1p1d") as d, browser(part) as found:
        await busy(d)
        await shoot(found, d.url, tmp_path)
        sizes = {file.name: _size(file) for file in tmp_path.iterdir()}
    assert {name: width for name, (width, _) in sizes.items() if name != "top.png"} == {
        **{f"page-desktop-{scheme}.png": 1920 for scheme in ("light", "dark")},
        **{f"page-phone-{scheme}.png": 780 for scheme in ("light", "dark")},
    }
    assert all(width > 700 and height > 300 for width, height in sizes.values()) and "top.png" in sizes


def _size(file: Path) -> tuple[int, int]:
    with Image.open(file) as picture:
        return picture.size


async def test_who_wants_no_motion_gets_none(part: Find) -> None:
    async with deployment("1e1p1d") as d, browser(part) as found:
        await busy(d)
        moving = "[...document.getAnimations()].length"
        page, _ = await opened(found, d)
        await expect(page.locator("#flow figcaption")).to_contain_text("encode to prefill")
        assert await page.evaluate(moving) > 0
        still, _ = await opened(found, d, reduced_motion="reduce")
        await expect(still.locator("#flow figcaption")).to_contain_text("encode to prefill")
        assert await still.evaluate(moving) == 0
