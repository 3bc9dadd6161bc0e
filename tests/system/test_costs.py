"""What the proxy predicts of an image is what a real encoder makes of it, which it has only asked for its numbers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from engines.encoder.app import build
from engines.serve import running
from engines.settings import EncoderSettings
from proxy import openai
from proxy.core import Api
from proxy.joining import detect
from proxy.media.costs import Costs, OneVision
from proxy.media.vision import Vision
from proxy.openai import Identity
from tests.fakes.media import chat, image, part
from tests.support.checkpoints import FAMILIES, checkpoint

JSON = {"content-type": "application/json"}
SIZES = [
    (640, 480, "PNG"),
    (1280, 720, "JPEG"),
    (77, 301, "WEBP"),
    (1500, 900, "TIFF"),
    (33, 34, "GIF"),
    (90, 91, "BMP"),
]


@pytest.mark.parametrize("family", FAMILIES)
async def test_tokens_and_bytes_are_predicted_exactly(family: str, tmp_path: Path) -> None:
    settings = EncoderSettings(
        model=checkpoint(family), host="127.0.0.1", port=0, transfer="storage", storage_path=tmp_path
    )
    async with build(settings) as app, running(app, settings) as url, aiohttp.ClientSession() as http:

        async def ask(path: str) -> Any:
            async with http.get(url + path) as response:
                return await response.json() if response.status == 200 else None

        found = await detect.detect(ask)
        assert found is not None
        costs = Costs(OneVision(Vision(**found.facts["vision"])))
        body = chat(
            *(part(image(width, height, kind), kind.lower()) for width, height, kind in SIZES), model=found.model
        )
        items = openai.parse(orjson.dumps(body), Api.CHAT, "id", Identity(), costs=costs).items
        content = body["messages"][0]["content"][1:]
        asked = {"model": found.model, "messages": [{"role": "user", "content": content}]}
        async with http.post(
            f"{url}/v1/chat/completions", data=io.BytesIO(orjson.dumps(asked)), headers=JSON
        ) as response:
            assert response.status == 200
            entries = (await response.json())["ec_transfer_params"].values()
    told = {index: entry for entry in entries for index in entry["item_indices"]}
    assert [item.tokens for item in items] == [told[item.index]["num_tokens"] for item in items]
    assert [item.nbytes for item in items] == [4 * told[i.index]["shape"][0] * told[i.index]["shape"][1] for i in items]
