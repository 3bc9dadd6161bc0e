"""The page's files and what they are told, by HTTP: types, caching, what browsers must not do, keys."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from tests.fakes.deployment import deployment

NAMES = sorted(file.name for file in files("proxy").joinpath("ui").iterdir())
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


async def test_every_file_is_served_once_and_nothing_else_is() -> None:
    async with deployment("1b") as d:
        for path in ("/ui", *(f"/ui/{name}" for name in NAMES)):
            answer = await d.get(path)
            kind = TYPES["html" if path == "/ui" else path.rpartition(".")[2]]
            assert answer.status == 200 and answer.headers["content-type"].startswith(kind), path
            assert answer.headers["x-content-type-options"] == "nosniff"
            rules = answer.headers["content-security-policy"]
            assert rules.startswith("default-src 'none'") and "unsafe" not in rules and "*" not in rules
            tag = answer.headers["etag"]
            async with d.http.get(d.url + path, headers={"if-none-match": tag}) as again:
                assert (again.status, await again.read()) == (304, b""), "it need not come again"
            async with d.http.get(d.url + path, headers={"if-none-match": '"another"'}) as again:
                assert again.status == 200
        for path in ("/ui/", "/ui/../settings/__init__.py", "/ui/%2e%2e/page.py", "/ui/missing.js"):
            assert (await d.get(path)).status == 404, path


@pytest.mark.parametrize("name", NAMES)
def test_no_file_asks_for_anything_of_another_host(name: str) -> None:
    text = files("proxy").joinpath("ui", name).read_text()
    hosts = set(re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]+", text)) - {"http://www.w3.org"}
    assert not hosts, "the page must work where there is no Internet"
    assert "eval(" not in text and not re.search(r"\son\w+=|\sstyle=", text), "the page's own rules forbid it"


async def test_the_key_is_judged_without_doing_anything_with_it() -> None:
    async with deployment("1b", admin_key="secret") as d:
        for given, status in (({}, 401), ({"x-api-key": "wrong"}, 401), ({"x-api-key": "secret"}, 204)):
            async with d.http.get(f"{d.url}/ui/key", headers=given) as answer:
                assert answer.status == status
        assert (await d.get("/ui/state")).json["locked"] is True
    async with deployment("1b") as d:
        assert (await d.get("/ui/key")).status == 204, "there is no key: everybody may"
        assert (await d.get("/ui/state")).json["locked"] is False


async def test_points_are_asked_for_by_number() -> None:
    async with deployment("1b") as d:
        for wrong in ("-1", "x", "1e3", "9" * 20):
            refused = await d.get(f"/ui/state?since={wrong}")
            assert (refused.status, refused.error["param"]) == (400, "since"), wrong
        answer = await d.get("/ui/state?since=0")
        assert answer.status == 200 and answer.headers["cache-control"] == "no-store"
