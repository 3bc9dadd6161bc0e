"""Keys as clients meet them: who is let in, what each may do, who guesses, and what engines get to know."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from proxy import derived
from proxy.auth.keys import made
from tests.fakes.deployment import Answer, Deployment, deployment
from tests.fakes.media import chat, image, part
from tests.fakes.native import Language
from tests.support.command import command
from tests.support.crowd import crowd
from tests.support.tls import Authority
from tests.support.waiting import eventually, until

KEYS = {name: made(name.encode() * 32) for name in ("acme", "tiny", "other")}
MESSAGES = "/v1/chat/completions"


def bearer(name: str) -> str:
    return f"Bearer {KEYS[name][0]}"


def written(folder: Path, **entries: str) -> Path:
    """A file with these keys, each with more of its entry."""
    file = folder / "keys.yaml"
    file.write_text("".join(f"- name: {name}\n  hash: {KEYS[name][1]}\n{more}" for name, more in entries.items()))
    return file


@asynccontextmanager
async def keyed(
    folder: Path, topology: str = "1b", /, *, settings: Any = None, **entries: str
) -> AsyncIterator[Deployment]:
    async with deployment(topology, api_keys=written(folder, **entries), **(settings or {})) as d:
        yield d


async def test_who_has_no_key_is_not_served_and_learns_how_to_be(tmp_path: Path) -> None:
    async with keyed(tmp_path, acme="") as d:
        for headers in (
            {},
            {"authorization": "Basic YTpi"},
            {"authorization": "Bearer "},
            {"authorization": "Bearer no"},
        ):
            answer = await d.post(chat(), **headers)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer" and answer.error["type"] == "authentication_error"
        assert (await d.get("/v1/models")).status == 401
        assert (await d.get("/health")).status == (await d.get("/ready")).status == 200
        assert (await d.post(chat(), authorization=bearer("acme"))).status == 200
        assert (await d.post(chat(), x_api_key=KEYS["acme"][0])).status == 200
        assert len(d.combined[0].calls) == 2


async def test_who_has_no_key_sends_no_body(tmp_path: Path) -> None:
    """It is refused by its head: its megabytes are not waited for."""
    async with keyed(tmp_path, acme="") as d:
        reader, writer = await asyncio.open_connection("127.0.0.1", d.proxy.port)
        head = f"POST {MESSAGES} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer no\r\ncontent-length: 9999999\r\n\r\n"
        writer.write(head.encode())
        assert (await reader.readline()) == b"HTTP/1.1 401 Unauthorized\r\n"
        writer.close()


async def test_the_official_client_understands_refusals(tmp_path: Path) -> None:
    async with keyed(tmp_path, tiny="  models: [tiny]\n  requests_per_minute: 1\n") as d:
        for key, model, error in (
            ("no", "tiny", openai.AuthenticationError),
            (KEYS["tiny"][0], "large", openai.PermissionDeniedError),
            (KEYS["tiny"][0], "tiny", openai.RateLimitError),
        ):
            async with openai.AsyncOpenAI(base_url=f"{d.url}/v1", api_key=key, max_retries=0) as client:
                with pytest.raises(error):
                    await client.chat.completions.create(model=model, messages=[])


async def test_a_key_is_for_its_models_and_sees_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with keyed(tmp_path, acme="  models: ['t*']\n", other="  models: [large]\n") as d:
        assert (await d.post(chat(model="tiny"), authorization=bearer("acme"))).status == 200
        for key, body in (("other", chat(model="tiny")), ("acme", chat(model="large")), ("acme", {"messages": []})):
            answer = await d.post(body, authorization=bearer(key))
            assert (answer.status, answer.error["code"], answer.error["param"]) == (403, "model_not_allowed", "model")
        d.proxy.endings.flush()
        d.proxy.access.flush()
        assert " key=other " in (said := capsys.readouterr().err) and "403" in said
        shown = [await _get(d, "/v1/models", authorization=bearer(key)) for key in ("acme", "other")]
        assert [[model["id"] for model in answer.json["data"]] for answer in shown] == [["tiny"], []]
        assert len(d.combined[0].calls) == 1


async def test_requests_per_minute_are_counted_and_told(tmp_path: Path) -> None:
    async with keyed(tmp_path, acme="  requests_per_minute: 3\n", other="") as d:
        assert [(await d.post(chat(), authorization=bearer("acme"))).status for _ in range(3)] == [200] * 3
        answer = await d.post(chat(), authorization=bearer("acme"))
        assert (answer.status, answer.error["code"], answer.error["retryable"]) == (429, "rate_limit_exceeded", True)
        assert "requests_per_minute 3" in answer.error["message"] and answer.headers["retry-after"] == "20"
        assert (await d.post(chat(), authorization=bearer("other"))).status == 200, "that is another's"


async def test_tokens_are_charged_as_engines_count_them(tmp_path: Path) -> None:
    async with keyed(tmp_path, acme="  tokens_per_minute: 20\n") as d:
        statuses = [(await d.post(chat(), authorization=bearer("acme"))).status for _ in range(3)]
        assert statuses == [200, 200, 429], "each took 7 tokens of prompt and 4 of answer"
        refused = await d.post(chat(), authorization=bearer("acme"))
        assert "tokens_per_minute" in refused.error["message"]


@pytest.mark.parametrize("how", ["answered", "failed", "left"])
async def test_places_are_given_back_however_a_request_ends(tmp_path: Path, how: str) -> None:
    async with keyed(tmp_path, acme="  concurrent: 1\n", settings={"max_attempts": 1}) as d:
        engine = d.combined[0]
        engine.gate = asyncio.Event()
        first = asyncio.create_task(d.post(chat(), authorization=bearer("acme")))
        await engine.until(lambda: engine.running == 1)
        answer = await d.post(chat(), authorization=bearer("acme"))
        assert (answer.status, answer.error["code"]) == (429, "rate_limit_exceeded")
        assert "concurrent 1 at once" in answer.error["message"]
        if how == "left":
            first.cancel()
            await engine.until(lambda: engine.running == 0)
            await d.settle()
        else:
            if how == "failed":
                await engine.stop()
            engine.gate.set()
            assert (await first).status == (200 if how == "answered" else 502)
        assert repr(d.proxy.guard._quota) == "<Quota 1 keys, 0 requests in flight>"


async def test_tenants_of_keys_share_no_embeddings_and_engines_know_of_none(tmp_path: Path) -> None:
    entries = {"acme": "  tenant: a\n", "tiny": "  tenant: a\n", "other": "  tenant: b\n"}
    async with keyed(tmp_path, "1e1b", **entries) as d:
        for key in entries:
            assert (await d.post(chat(part(image())), authorization=bearer(key))).status == 200
        acme, tiny, other = (call.body["messages"][0]["content"][0]["uuid"] for call in d.encoders[0].calls)
        assert acme == tiny != other
        assert not any("tenant" in name for call in d.encoders[0].calls for name in call.headers)


async def test_a_salt_keeps_keys_apart_wherever_they_are_sent(tmp_path: Path) -> None:
    async with keyed(tmp_path, "1e1b", settings={"tenant_salt": "pepper"}, acme="", other="") as d:
        for key in ("acme", "other"):
            assert (await d.post(chat(part(image())), x_api_key=KEYS[key][0])).status == 200
        assert len({call.body["messages"][0]["content"][0]["uuid"] for call in d.encoders[0].calls}) == 2


async def test_no_header_leads_to_the_embeddings_of_another_key(tmp_path: Path) -> None:
    async with keyed(tmp_path, "1e1b", settings={"tenant_salt": "pepper"}, acme="", other="") as d:
        assert (await d.post(chat(part(image())), x_api_key=KEYS["acme"][0])).status == 200
        assert (await d.post(chat(part(image())), x_api_key=KEYS["other"][0], authorization="acme")).status == 200
        assert len({call.body["messages"][0]["content"][0]["uuid"] for call in d.encoders[0].calls}) == 2


async def test_no_key_of_ours_reaches_an_engine(tmp_path: Path) -> None:
    async with keyed(tmp_path, settings={"forward_authorization": True}, acme="") as d:
        await d.post(chat(), authorization=bearer("acme"))
        await d.post(chat(), authorization="Bearer the engines'", x_api_key=KEYS["acme"][0])
        first, second = (call.headers for call in d.combined[0].calls)
        assert not {"authorization", "x-api-key"} & first.keys()
        assert second["authorization"] == "Bearer the engines'" and "x-api-key" not in second


async def test_other_keys_count_from_the_next_request_on(tmp_path: Path) -> None:
    async with keyed(tmp_path, acme="") as d:
        engine = d.combined[0]
        engine.gate = asyncio.Event()
        running = asyncio.create_task(d.post(chat(), authorization=bearer("acme")))
        await engine.until(lambda: engine.running == 1)
        written(tmp_path, other="")
        d.proxy.go_by(d.proxy.settings)
        assert (await d.post(chat(), authorization=bearer("acme"))).status == 401
        engine.gate.set()
        assert (await running).status == 200, "it was let in"
        assert (await d.post(chat(), authorization=bearer("other"))).status == 200
        (tmp_path / "keys.yaml").write_text("- name: broken")
        with pytest.raises(ValueError, match="line 1: hash"):
            d.proxy.go_by(d.proxy.settings)
        assert (await d.post(chat(), authorization=bearer("other"))).status == 200, "the old ones stay"


class TestGuessing:
    """The clock stands still: nothing is forgotten or forgiven."""

    @pytest.fixture
    async def d(self, tmp_path: Path) -> AsyncIterator[Deployment]:
        settings = {"admin_key": "s3cret", "trusted_proxies": "127.0.0.0/8"}
        async with keyed(tmp_path, settings=settings, acme="", other="") as d:
            d.proxy.guard._clock = lambda: 1000.0
            yield d

    async def guess(self, d: Deployment, times: int, ask: Callable[[str], Any]) -> list[int]:
        return [(await ask(str(n))).status for n in range(times)]

    async def test_who_guesses_is_slowed_down_even_with_a_right_key(self, d: Deployment) -> None:
        found = await self.guess(d, 12, lambda key: d.post(chat(), authorization=f"Bearer {key}"))
        assert found == [401] * 9 + [429] * 3
        answer = await d.post(chat(), authorization=bearer("acme"))
        assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (429, "too_many_wrong_keys", "1")
        d.proxy.guard._clock = lambda: 1001.0
        assert (await d.post(chat(), authorization=bearer("acme"))).status == 200

    async def test_who_was_right_there_before_is_served_beside_them(self, d: Deployment) -> None:
        assert (await d.post(chat(), authorization=bearer("acme"))).status == 200
        await self.guess(d, 12, lambda key: d.post(chat(), authorization=f"Bearer {key}"))
        assert (await d.post(chat(), authorization=bearer("acme"))).status == 200
        assert (await d.post(chat(), authorization=bearer("other"))).status == 429

    async def test_other_addresses_are_not_slowed_down(self, d: Deployment) -> None:
        def from_(where: str) -> Callable[[str], Any]:
            return lambda key: d.post(chat(), authorization=f"Bearer {key}", x_forwarded_for=where)

        assert (await self.guess(d, 12, from_("192.0.2.1")))[-1] == 429
        assert (await self.guess(d, 12, from_("spoofed, 192.0.2.1"))) == [429] * 12, "whatever it says of itself"
        assert (await self.guess(d, 2, from_("x" * 30_000 + ", 192.0.2.1"))) == [429] * 2, "and at what length"
        answer = await d.post(chat(), authorization=bearer("acme"), x_forwarded_for="192.0.2.2")
        assert answer.status == 200

    async def test_the_admin_key_is_guarded_likewise(self, d: Deployment) -> None:
        found = await self.guess(d, 12, lambda key: d.post(b"", "/start_profile", x_api_key=key))
        assert found == [401] * 9 + [429] * 3
        assert (await d.post(b"", "/start_profile", x_api_key="s3cret")).status == 429

    async def test_who_brings_no_key_guesses_none(self, d: Deployment) -> None:
        assert await self.guess(d, 20, lambda _: d.post(chat())) == [401] * 20


async def test_a_key_is_known_to_come_from_so_many_addresses_and_no_more(tmp_path: Path) -> None:
    async with keyed(tmp_path, settings={"trusted_proxies": "127.0.0.0/8"}, acme="") as d:
        for n in range(80):
            await _get(d, "/v1/models", authorization=bearer("acme"), x_forwarded_for=f"192.0.2.{n}")
        assert len(d.proxy.guard._places["acme"]) == 64
        written(tmp_path, other="")
        d.proxy.guard.go_by(derived.rights(d.proxy.settings))
        assert "acme" not in d.proxy.guard._places


async def _get(d: Deployment, path: str, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with d.http.get(d.url + path, headers=named) as response:
        return Answer(response.status, response.headers, await response.read())


async def test_limits_are_exact_over_workers_and_a_dead_ones_places_are_given_back(tmp_path: Path) -> None:
    (folder := tmp_path / "run").mkdir()
    keys = written(tmp_path, acme="  concurrent: 5\n", other="  requests_per_minute: 20\n")
    async with Language() as engine:
        flags = ("--decode-servers-urls", engine.url, "--api-keys", str(keys))
        async with crowd(folder, 3, *flags) as proxy:

            async def ask(name: str) -> int:
                headers = {"authorization": bearer(name)}
                try:
                    async with proxy.http.post(proxy.url + MESSAGES, json=chat(), headers=headers) as response:
                        return response.status
                except aiohttp.ClientError:
                    return 0

            assert sorted(await asyncio.gather(*(ask("other") for _ in range(60)))) == [200] * 20 + [429] * 40
            gate = engine.gate = asyncio.Event()
            asking = [asyncio.create_task(ask("acme")) for _ in range(30)]
            await engine.until(lambda: engine.running == 5)
            await until(lambda: sum(task.done() for task in asking) == 25)
            keys.write_text("- {name: acme}\n")  # refused: whoever is started now goes by the old ones as well
            for pid in proxy.workers()[:2]:
                os.kill(pid, signal.SIGKILL)
            await until(lambda: len(proxy.workers()) == 3 and engine.running == 5 - engine.aborted)
            asking += [asyncio.create_task(ask("acme")) for _ in range(30)]
            await engine.until(lambda: engine.running == 5)
            await until(lambda: sum(not task.done() for task in asking) == 5)
            gate.set()
            statuses = await asyncio.gather(*asking)
            assert statuses.count(200) == 5 and set(statuses) <= {200, 429, 0}, "0: its worker was killed"


async def test_keys_and_certificates_are_read_again_on_a_signal(tmp_path: Path) -> None:
    """By the command, as processes: two workers, each told by the supervisor."""
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    keys, files = written(tmp_path, acme=""), old.files("proxy")
    connector = aiohttp.TCPConnector(force_close=True)
    async with Language() as engine, aiohttp.ClientSession(connector=connector) as http:
        argv = ("--decode-servers-urls", engine.url, "--host", "127.0.0.1", "--port", "0", "--workers", "2")
        secured = ("--api-keys", str(keys), "--tls-cert", str(files.cert), "--tls-key", str(files.key))
        async with command(*argv, *secured) as (process, line):
            url = line.split()[1] + "/v1/models"

            async def answers(ca: Authority, name: str) -> list[int]:
                found = []
                for _ in range(6):
                    try:
                        headers = {"authorization": bearer(name)}
                        async with http.get(url, ssl=ca.trusting(), headers=headers) as response:
                            found.append(response.status)
                    except aiohttp.ClientConnectorCertificateError:
                        found.append(0)
                return found

            async def all_answer(ca: Authority, name: str, status: int) -> bool:
                return set(await answers(ca, name)) == {status}

            await eventually(lambda: all_answer(old, "acme", 200))
            written(tmp_path, other="")
            new.files("proxy")
            process.send_signal(signal.SIGHUP)
            await eventually(lambda: all_answer(new, "other", 200))
            assert await all_answer(new, "acme", 401) and await all_answer(old, "other", 0)
            process.send_signal(signal.SIGTERM)
