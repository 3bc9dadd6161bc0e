"""The routes as clients see them, the official client first."""

from __future__ import annotations

import asyncio
import gzip

import openai
import orjson
import pytest

from tests.fakes.deployment import deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, data_url, image, part
from tests.fakes.native import PIECES

TEXT = "".join(PIECES)


@pytest.mark.parametrize("handoff", ["push", "pull"])
async def test_the_official_client(handoff: str) -> None:
    async with deployment("1e1p1d", handoff) as d:
        client = openai.AsyncOpenAI(base_url=f"{d.url}/v1", api_key="sk-me", max_retries=0)
        async with client:
            content = [
                {"type": "text", "text": "what is this?"},
                {"type": "image_url", "image_url": {"url": data_url(image())}},
            ]
            whole = await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": content}], max_tokens=9
            )
            assert whole.choices[0].message.content == TEXT
            assert whole.usage is not None and whole.usage.prompt_tokens == 7
            stream = await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": content}], stream=True
            )
            pieces = [chunk.choices[0].delta.content async for chunk in stream]
            assert "".join(filter(None, pieces)) == TEXT
            completion = await client.completions.create(model="tiny", prompt="hi")
            assert completion.choices[0].text == TEXT
            assert [model.id async for model in client.models.list()] == ["tiny"]
            assert not any("authorization" in call.headers for e in d.engines for call in e.calls)


async def test_the_official_client_understands_errors() -> None:
    async with deployment("1b") as d, openai.AsyncOpenAI(base_url=f"{d.url}/v1", api_key="k", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="no encoder") as caught:
            await client.chat.completions.create(**chat(part(image())))
        assert caught.value.param == "messages[0].content[1]"
        await d.combined[0].stop()
        with pytest.raises(openai.InternalServerError, match="cannot be reached"):
            await client.chat.completions.create(**chat(stream=True))


async def test_the_official_client_hears_of_a_broken_stream() -> None:
    async with deployment("1b") as d, openai.AsyncOpenAI(base_url=f"{d.url}/v1", api_key="k", max_retries=0) as client:
        d.combined[0].fail(Fault(Kind.TRUNCATED, after=2))
        got = []
        with pytest.raises(openai.APIError, match="in the middle of its answer"):
            async for chunk in await client.chat.completions.create(**chat(stream=True)):
                got.append(chunk.choices[0].delta.content)
        assert "".join(filter(None, got)) == "Hello, "


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1.2:3_X", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("a/b", False), ("", False)],
)
async def test_request_ids_are_kept_or_made(given: str, kept: bool) -> None:
    async with deployment("1b") as d:
        answer = await d.post(chat(), x_request_id=given)
        found = answer.headers["x-request-id"]
        assert (found == given) is kept and found
        assert d.combined[0].calls[0].id == found
        assert (await d.get("/health")).headers["x-request-id"]


async def test_what_engines_see_of_a_clients_headers() -> None:
    async with deployment("1b") as d:
        await d.post(
            chat(),
            authorization="Bearer k",
            traceparent="00-1-2-03",
            x_session_id="s",
            x_api_key="admin's own",
            cookie="a=b",
            accept_encoding="gzip",
        )
        sent = d.combined[0].calls[0].headers
        assert (sent["traceparent"], sent["x-session-id"]) == ("00-1-2-03", "s")
        assert not {"authorization", "x-api-key", "cookie", "accept-encoding"} & sent.keys()


async def test_a_clients_credentials_reach_engines_only_where_that_is_asked_for() -> None:
    async with deployment("1b", forward_authorization=True) as d:
        await d.post(chat(), authorization="Bearer k")
        assert d.combined[0].calls[0].headers["authorization"] == "Bearer k"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (chat(kv_transfer_params={"remote_host": "evil"}), "kv_transfer_params"),
        (chat({"type": "image_embeds", "image_embeds": {}}), "messages[0].content[1]"),
    ],
)
async def test_clients_may_not_speak_for_the_proxy(body: dict[str, object], param: str) -> None:
    async with deployment("1e1b") as d:
        answer = await d.post(body)
        assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "forbidden_field", param)
        assert not any(engine.calls for engine in d.engines)


async def test_tenants_with_a_salt_do_not_share_embeddings() -> None:
    async with deployment("1e1b", tenant_salt="pepper") as d:
        for key in ("Bearer a", "Bearer b", "Bearer a"):
            assert (await d.post(chat(part(image())), authorization=key)).status == 200
        a, b, again = (call.body["messages"][0]["content"][0]["uuid"] for call in d.encoders[0].calls)
        assert a == again != b


async def test_bodies_may_be_compressed_and_have_a_limit() -> None:
    async with deployment("1b", max_body_bytes=10_000) as d:
        packed = gzip.compress(orjson.dumps(chat(text="x" * 5000)))
        assert (await d.post(packed, content_encoding="gzip")).status == 200
        answer = await d.post(chat(text="x" * 20_000))
        assert (answer.status, answer.error["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(("size", "coding", "status"), [(20_000, "", 413), (4, "gzip", 400), (4, "br", 415)])
async def test_a_body_that_cannot_be_read_is_a_request_that_failed(size: int, coding: str, status: int) -> None:
    async with deployment("1b", max_body_bytes=10_000) as d:
        headers = {"content_encoding": coding} if coding else {}
        answer = await d.post(b"x" * size, **headers)
        name, told = answer.headers["x-request-id"], (await d.get("/requests")).json["requests"]
        assert [(one["id"], one["status"], one["code"]) for one in told] == [(name, status, answer.error["code"])]
        assert (
            f'triptych_requests_total{{path="none",status="{status}"}} 1.0' in (await d.get("/metrics")).body.decode()
        )


async def test_what_is_not_there_is_told_in_the_contract_too() -> None:
    async with deployment("1b") as d:
        for answer, status in ((await d.get("/v2"), 404), (await d.get("/v1/chat/completions"), 405)):
            assert answer.status == status
            assert answer.error["type"] == "invalid_request_error" and answer.headers["x-request-id"]


async def test_health_and_ready() -> None:
    async with deployment("1e1b") as d:
        assert ((await d.get("/health")).status, (await d.get("/ready")).status) == (200, 200)
        await d.encoders[0].stop()
        d.proxy.fleet.remove(d.combined[0].url)
        answer = await d.get("/ready")
        assert (answer.status, answer.json["ready"]) == (503, False)
        assert [i["role"] for i in answer.json["instances"]] == ["encode"]


async def test_models_come_from_every_engine_that_can_tell() -> None:
    async with deployment("2b") as d:
        assert [m["id"] for m in (await d.get("/v1/models")).json["data"]] == ["tiny"]
        await d.combined[0].stop()
        assert (await d.get("/v1/models")).status == 200
        await d.combined[1].stop()
        assert (await d.get("/v1/models")).status == 502
        d.proxy.fleet.remove(d.combined[0].url)
        d.proxy.fleet.remove(d.combined[1].url)
        assert (await d.get("/v1/models")).status == 503


async def test_a_mistake_of_the_proxy_itself_is_a_500_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with deployment("1b") as d:
        d.proxy.dispatcher._legs._dialects = lambda instance: {}[instance.dialect]
        answer = await d.post(chat())
        assert (answer.status, answer.error["code"]) == (500, "internal_error")
        assert "KeyError" in caplog.text


async def test_one_line_per_request(capsys: pytest.CaptureFixture[str]) -> None:
    async with deployment("1b") as d:
        await d.post(chat(), x_request_id="r1")
        d.combined[0].fail(Fault(Kind.STATUS, status=400, error="no\nthanks"))
        await d.post(chat(), x_request_id="r2")
    served, refused = capsys.readouterr().err.splitlines()
    assert " INFO proxy.access r1 /v1/chat/completions 200 e2e=" in served and "PD; both=" in served
    assert " r2 /v1/chat/completions 400 " in refused and refused.endswith("error=decode: refused with 400")


async def test_parsing_of_large_bodies_leaves_the_loop_free() -> None:
    async with deployment("1e1b") as d:
        large = part(image() + bytes(8 << 20))
        asking = asyncio.create_task(d.post(chat(large)))
        while not asking.done():
            assert (await d.get("/health")).status == 200
        assert (await asking).status == 200
