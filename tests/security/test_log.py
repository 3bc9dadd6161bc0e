"""The log of a busy proxy, in a process of its own: it has no secret, no query of a URL, no media and no prompt."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import aiohttp
import orjson
import pytest

from proxy.auth.keys import made
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, data_url, image, part
from tests.fakes.native import Decode, Encoder, Prefill
from tests.support.command import command, ready

KEY, DIGEST = made(b"k" * 32)
PROMPT = "my diary of the third of may"
QUERY = "X-Amz-Signature-of-somebody"
ADMIN, ENGINE, WRONG = "admin-key-of-operators", "engine-key-of-engines", "wrong-key-of-a-guesser"
PICTURE = image(16, 16, "BMP")
SECRETS = (KEY, DIGEST, PROMPT, QUERY, ADMIN, ENGINE, WRONG, "client-authorization", "value-of-a-header")


def far(path: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:9/{path}?{QUERY}#{QUERY}"}}


async def busy(http: aiohttp.ClientSession, url: str, faulty: list[Decode | Prefill | Encoder]) -> list[int]:
    """Requests that are served, refused, forbidden, malformed, failed by engines, and left."""
    bearer = {"authorization": f"Bearer {KEY}", "x-custom": "value-of-a-header"}
    statuses = []

    async def ask(body: object, path: str = "/v1/chat/completions", **headers: str) -> None:
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        given = bearer | {name.replace("_", "-"): value for name, value in headers.items()}
        async with http.post(url + path, data=data, headers=given) as response:
            await response.read()
            statuses.append(response.status)

    for body in (
        chat(text=PROMPT),
        chat(part(PICTURE), text=PROMPT, stream=True),
        chat(far("a.png"), text=PROMPT),
        chat({"type": "image_url", "image_url": f"http://169.254.169.254/?{QUERY}"}, text=PROMPT),
        chat({"type": "image_url", "image_url": f"https://user:{QUERY}@h.example/"}, text=PROMPT),
        chat({"type": "image_url", "image_url": data_url(PICTURE) + "!"}, text=PROMPT),
        chat(text=PROMPT, kv_transfer_params={PROMPT: PROMPT}),
        PROMPT.encode(),
        {"messages": PROMPT},
    ):
        await ask(body)
    told = orjson.dumps({"error": {"message": f"cannot read {PROMPT!r} of {data_url(PICTURE)}", "type": PROMPT}})
    for engine in faulty:
        for fault in (
            Fault(Kind.STATUS, status=400, error=told.decode()),
            Fault(
                Kind.STATUS, status=500, error=f"GET https://h.example/a?{QUERY}: Bearer {ENGINE} {data_url(PICTURE)}"
            ),
            Fault(Kind.RESET),
        ):
            engine.always = fault
            await ask(chat(part(PICTURE), text=PROMPT))
            await ask(chat(part(PICTURE), text=PROMPT, stream=True))
            engine.always = None
    await ask(chat(text=PROMPT), authorization=f"Bearer {WRONG}")
    await ask(chat(text=PROMPT), authorization="client-authorization")
    await ask({"url": "http://127.0.0.1:9"}, "/instances", x_api_key=WRONG)
    await ask(b"", f"/{PROMPT.replace(' ', '%20')}?{QUERY}")
    await ask(chat(text=PROMPT), x_request_timeout=PROMPT)
    return statuses


@pytest.mark.parametrize("form", ["console", "json"])
async def test_nothing_of_a_request_is_in_the_log(form: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"- name: acme\n  hash: {DIGEST}\n")
    async with Encoder() as e, Prefill() as p, Decode() as d, aiohttp.ClientSession() as http:
        flags = {
            "encode-servers-urls": e.url, "prefill-servers-urls": p.url, "decode-servers-urls": d.url,
            "host": "127.0.0.1", "port": "0", "api-keys": str(keys), "admin-key": ADMIN, "engine-key": ENGINE,
            "tenant-salt": "salt-of-tenants", "media-urls": "fetch", "media-networks": "127.0.0.0/8",
            "access-log": form, "log-level": "debug", "max-attempts": "1", "breaker-failures": "1000",
            "probe-interval": "0.1",
        }  # fmt: skip
        async with command(*(word for name, value in flags.items() for word in (f"--{name}", value))) as (
            process,
            said,
        ):
            url = said.split()[1]
            await ready(http, url)
            statuses = await busy(http, url, [e, p, d])
            process.terminate()
            assert process.stderr is not None
            async with asyncio.timeout(20):
                log = (await process.stderr.read()).decode()
    assert set(statuses) >= {200, 400, 401, 403, 404, 500, 502}
    assert log.count(" /v1/chat/completions " if form == "console" else '"api":"/v1/chat/completions"') >= 20
    lines = {secret: [line for line in log.splitlines() if secret in line] for secret in (*SECRETS, "salt-of-tenants")}
    assert not any(lines.values()), {secret: found for secret, found in lines.items() if found}
    encoded = base64.b64encode(PICTURE).decode()
    assert not any(encoded[at : at + 24] in log for at in range(0, len(encoded) - 24, 24)), "bytes of media"
    assert PROMPT.replace(" ", "%20") not in log
