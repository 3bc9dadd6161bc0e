"""Whoever guesses keys learns next to nothing, over however many connections, and finds none in the log."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from proxy.auth.keys import made
from tests.fakes.deployment import Deployment, deployment
from tests.fakes.media import chat

KEY, DIGEST = made(b"k" * 32)


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
async def test_of_many_guesses_few_are_looked_at_and_a_right_one_among_them_is_not_known_by_its_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], header: str
) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"- {{name: acme, hash: '{DIGEST}'}}\n")
    async with deployment("1b", api_keys=keys) as d:
        d.proxy.guard._clock = lambda: 1000.0
        wrong = await asyncio.gather(*(_guess(d, header, f"{KEY[:-8]}{n:08}") for n in range(300)))
        assert sorted(set(wrong)) == [401, 429] and wrong.count(401) == 9
        right, other = await _guess(d, header, KEY), await _guess(d, header, KEY[::-1])
        assert right == other == 429
        assert not d.combined[0].calls
        d.proxy.endings.flush()
        d.proxy.access.flush()
        said = capsys.readouterr()
        assert " 401 " in said.err and KEY[:-8] not in said.err + said.out


@pytest.mark.parametrize("credential", ["", " ", "\udcff" * 4, "x" * 60_000, "Bearer " * 1000, DIGEST, DIGEST[7:]])
async def test_odd_credentials_are_refused_like_any_other(tmp_path: Path, credential: str) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"- {{name: acme, hash: '{DIGEST}'}}\n")
    async with deployment("1b", api_keys=keys, admin_key="s3cret") as d:
        raw = credential.encode("utf-8", "surrogateescape")
        for method, path in ((b"GET", b"/v1/models"), (b"DELETE", b"/instances")):
            reader, writer = await asyncio.open_connection("127.0.0.1", d.proxy.port)
            writer.write(b"%b %b HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %b\r\n\r\n" % (method, path, raw))
            assert (await reader.readline()) == b"HTTP/1.1 401 Unauthorized\r\n"
            writer.close()


async def _guess(d: Deployment, header: str, key: str) -> int:
    value = f"Bearer {key}" if header == "authorization" else key
    url = f"{d.url}/v1/chat/completions"
    async with aiohttp.ClientSession() as http, http.post(url, json=chat(), headers={header: value}) as response:
        return response.status
