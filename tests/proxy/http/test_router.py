"""Finding handlers."""

import pytest

from proxy.http.message import Response
from proxy.http.router import Audience, NoRoute, Router, delete, get, post
from proxy.http.server import Request


async def one(request: Request) -> Response:
    return Response(201)


async def two(request: Request) -> Response:
    return Response(202)


def test_a_path_and_a_method_find_their_handler() -> None:
    router = Router([get("/a", one), post("/a", two), delete("/b", one)])
    assert router.find("GET", "/a") is router.find("HEAD", "/a") is one
    assert router.find("POST", "/a") is two
    with pytest.raises(NoRoute, match="GET, POST") as caught:
        router.find("DELETE", "/a")
    assert caught.value.allowed == {"GET", "POST"}
    for path in ("/A", "/a/", "//a", "/c"):
        with pytest.raises(NoRoute, match="no such path") as caught:
            router.find("GET", path)
        assert not caught.value.allowed


def test_each_audience_finds_its_own() -> None:
    routes = [get("/a", one), get("/b", two, Audience.ADMINS), get("/c", one, Audience.ALL)]
    for audience, found in ((Audience.CLIENTS, "ac"), (Audience.ADMINS, "bc"), (Audience.ALL, "abc")):
        router = Router(routes, audience)
        for path in "abc":
            if path in found:
                assert router.find("GET", f"/{path}")
            else:
                with pytest.raises(NoRoute, match="no such path"):
                    router.find("GET", f"/{path}")


def test_a_path_with_a_slash_at_its_end_is_for_all_that_have_more_behind_it() -> None:
    router = Router([get("/a", one), get("/a/", two), delete("/a/b/", one), get("/a/c", one)])
    assert router.find("GET", "/a") is router.find("GET", "/a/c") is one
    assert router.find("GET", "/a/x") is router.find("GET", "/a/x/y") is router.find("HEAD", "/a/c/") is two
    assert router.find("DELETE", "/a/b/x") is one
    with pytest.raises(NoRoute, match="DELETE"):
        router.find("GET", "/a/b/x")
    for path in ("/a/", "/", "/b/a/x", "/ab"):
        with pytest.raises(NoRoute, match="no such path"):
            router.find("GET", path)
