"""The scaffold over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from engines.errors import BadRequest, Overloaded
from engines.http import check_model, json_response, read_json, request_id, sse
from engines.serve import running
from engines.settings import EngineSettings


class Toy:
    """An engine with one route per way to end."""

    stage = "prefill"
    role = "both"

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.lost = ""
        self.entered = asyncio.Event()
        self.cancelled = asyncio.Event()

    def routes(self) -> Iterable[web.RouteDef]:
        yield web.post("/echo", self.echo)
        yield web.post("/bad", self.bad)
        yield web.post("/full", self.full)
        yield web.post("/bug", self.bug)
        yield web.post("/wait", self.wait)
        yield web.post("/stream", self.stream)

    def info(self) -> Mapping[str, Any]:
        return {"toy": True}

    async def check(self) -> None:
        if self.lost:
            raise RuntimeError(self.lost)

    async def drain(self) -> None:
        pass

    async def echo(self, request: web.Request) -> web.Response:
        body = await read_json(request)
        check_model(body, settings())
        return json_response({"id": request_id(), "body": body})

    async def bad(self, _request: web.Request) -> web.Response:
        raise BadRequest("no such thing", param="x")

    async def full(self, _request: web.Request) -> web.Response:
        raise Overloaded("full: raise --kv-blocks", stage="decode")

    async def bug(self, _request: web.Request) -> web.Response:
        raise KeyError("secret")

    async def wait(self, _request: web.Request) -> web.Response:
        self.entered.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return web.Response()

    async def stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(sse({"part": 1}))
        raise Overloaded("lost the rest")


def settings(**changes: Any) -> EngineSettings:
    return EngineSettings(model=Path("/models/toy"), port=0, **changes)


async def post(url: str, **kwargs: Any) -> tuple[int, Any, Mapping[str, str]]:
    async with aiohttp.ClientSession() as session, session.post(url, **kwargs) as response:
        return response.status, await response.json(), response.headers


async def get(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text()


async def test_the_request_id_is_accepted_or_made_and_returned() -> None:
    async with running(Toy(), settings()) as url:
        _, body, headers = await post(f"{url}/echo", json={}, headers={"x-request-id": "req-1:0"})
        assert body["id"] == headers["x-request-id"] == "req-1:0"
        _, body, headers = await post(f"{url}/echo", json={})
        assert len(body["id"]) == 32
        assert body["id"] == headers["x-request-id"]
        _, body, _ = await post(f"{url}/echo", json={}, headers={"x-request-id": "a" * 300})
        assert len(body["id"]) == 32, "an id beyond any reason is replaced"


@pytest.mark.parametrize(
    ("route", "status", "kind", "stage", "retryable"),
    [
        ("/bad", 400, "invalid_request_error", "prefill", False),
        ("/full", 503, "overloaded_error", "decode", True),
        ("/bug", 500, "internal_error", "prefill", False),
        ("/nowhere", 404, "invalid_request_error", "prefill", False),
    ],
)
async def test_errors_are_openai_shaped(route: str, status: int, kind: str, stage: str, retryable: bool) -> None:
    async with running(Toy(), settings()) as url:
        got, body, headers = await post(url + route, json={}, headers={"x-request-id": "r"})
    assert (got, headers["x-request-id"]) == (status, "r")
    error = body["error"]
    assert (error["type"], error["stage"], error["retryable"]) == (kind, stage, retryable)
    assert "secret" not in error["message"]


@pytest.mark.parametrize(
    ("data", "code"), [(b"{", "invalid_json"), (b"[1]", "invalid_json"), (b"\xff", "invalid_json")]
)
async def test_a_body_that_is_no_json_object_is_a_400(data: bytes, code: str) -> None:
    async with running(Toy(), settings()) as url:
        status, body, _ = await post(f"{url}/echo", data=data)
    assert (status, body["error"]["code"]) == (400, code)


async def test_a_body_over_the_limit_names_the_flag() -> None:
    async with running(Toy(), settings(max_body_bytes="1KiB")) as url:
        status, body, _ = await post(f"{url}/echo", json={"x": "y" * 2000})
    assert status == 413
    assert "--max-body-bytes" in body["error"]["message"]


async def test_another_model_is_a_404() -> None:
    async with running(Toy(), settings()) as url:
        assert (await post(f"{url}/echo", json={"model": "toy"}))[0] == 200
        status, body, _ = await post(f"{url}/echo", json={"model": "gpt"})
    assert (status, body["error"]["code"]) == (404, "model_not_found")


async def test_common_routes() -> None:
    async with running(Toy(), settings()) as url:
        assert await get(f"{url}/health") == (200, '{"role":"both"}')
        _, info = await get(f"{url}/info")
        assert '"engine":"triptych"' in info
        assert '"toy":true' in info
        assert '"id":"toy"' in (await get(f"{url}/v1/models"))[1]
        await post(f"{url}/bad", json={})
        _, metrics = await get(f"{url}/metrics")
    assert 'triptych_http_request_seconds_count{route="/bad",status="400"} 1.0' in metrics


async def test_books_that_do_not_balance_are_an_error() -> None:
    toy = Toy()
    async with running(toy, settings()) as url:
        assert await get(f"{url}/audit") == (200, '{"balanced":true}')
        toy.lost = "block 3 belongs to nobody"
        status, body = await get(f"{url}/audit")
    assert status == 500
    assert "books_do_not_balance" in body
    assert "block 3 belongs to nobody" in body


async def test_a_broken_stream_is_cut_not_ended() -> None:
    async with running(Toy(), settings()) as url, aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientError):
            async with session.post(f"{url}/stream", json={}) as response:
                assert response.status == 200
                await response.read()


async def test_a_client_that_goes_away_cancels_its_handler() -> None:
    toy = Toy()
    async with running(toy, settings()) as url, asyncio.timeout(10):
        request = asyncio.create_task(post(f"{url}/wait", json={}))
        await toy.entered.wait()
        request.cancel()
        await toy.cancelled.wait()


async def test_with_a_key_everything_but_health_needs_it() -> None:
    async with running(Toy(), settings(key="s3cret")) as url, aiohttp.ClientSession() as session:
        for path, wanted, headers in (
            ("/health", 200, {}),
            ("/info", 401, {}),
            ("/metrics", 401, {"authorization": "Bearer wrong"}),
            ("/nowhere", 401, {"authorization": "s3cret"}),
            ("/info", 200, {"authorization": "Bearer s3cret"}),
            ("/nowhere", 404, {"authorization": "Bearer s3cret"}),
        ):
            async with session.get(url + path, headers=headers) as response:
                assert response.status == wanted, path
                if wanted == 401:
                    assert (await response.json())["error"]["code"] == "invalid_api_key"
        async with session.post(f"{url}/echo", json={}, headers={"authorization": "Bearer s3cret\xff"}) as response:
            assert response.status == 401
