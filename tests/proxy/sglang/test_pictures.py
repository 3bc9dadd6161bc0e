"""Images that would end an SGLang server, stopped at the proxy."""

from __future__ import annotations

import io
from typing import Any

import orjson
import pytest
from PIL import Image

from proxy import openai
from proxy.core import Api, Job
from proxy.errors import BadRequest
from proxy.openai import Identity
from proxy.sglang import pictures
from tests.fakes.deployment import deployment
from tests.fakes.media import chat, data_url, image, part
from tests.fakes.sglang import World

KINDS = ["PNG", "JPEG", "WEBP", "GIF", "BMP"]


def noise(kind: str, side: int = 120) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((side, side), 90).convert("RGB").save(out, kind)
    return out.getvalue()


def job(*parts: dict[str, Any]) -> Job:
    return openai.parse(orjson.dumps(chat(*parts)), Api.CHAT, "id", Identity())


@pytest.mark.parametrize("kind", KINDS)
def test_whole_images_pass(kind: str) -> None:
    pictures.check(job(part(noise(kind), kind.lower()), part(noise(kind, 400), kind.lower())))


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_breaks_off_is_named(kind: str) -> None:
    data = noise(kind, 400)
    with pytest.raises(BadRequest, match="cannot be decoded") as raised:
        pictures.check(job(part(image()), part(data[: len(data) // 2], kind.lower())))
    assert (raised.value.param, raised.value.code) == ("messages[0].content[2]", "invalid_image")


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "data:image/png;base64,?", "data:,hello"])
def test_what_is_no_image_is_refused(url: str) -> None:
    with pytest.raises(BadRequest):
        pictures.check(job({"type": "image_url", "image_url": url}))


def test_a_header_that_promises_gigapixels_is_refused_unread() -> None:
    bomb = bytearray(image())
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    with pytest.raises(BadRequest):
        pictures.check(job(part(bytes(bomb))))


def test_what_is_elsewhere_or_no_image_is_not_looked_at() -> None:
    audio = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    pictures.check(job({"type": "image_url", "image_url": {"url": "http://elsewhere/broken.png"}}, audio))


@pytest.mark.parametrize("topology", ["1b", "1p1d"])
async def test_a_server_is_not_called_with_a_broken_image(topology: str) -> None:
    async with deployment(topology, "auto", World().engines(), dialect="sglang") as it:
        broken = {"type": "image_url", "image_url": {"url": data_url(b"broken")}}
        answer = await it.post(chat(part(image()), broken))
        assert (answer.status, answer.error["param"]) == (400, "messages[0].content[2]")
        assert not [call for engine in it.engines for call in engine.calls if "messages" in call.body]
        assert (await it.post(chat(part(image())))).status == 200


async def test_other_families_decode_for_themselves() -> None:
    async with deployment("1e1b") as it:
        broken = {"type": "image_url", "image_url": {"url": data_url(b"broken")}}
        assert (await it.post(chat(broken))).status == 200
