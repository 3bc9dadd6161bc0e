"""The example proxies of vLLM and vLLM-Ascend, as far as the engines behind them can tell: what they send, in which
order, and which part of a reply they hand on. They pick nothing, retry nothing and repair nothing.

    Epd           vLLM 0.32, encoder, prefill (or none) and decode
    Layerwise     vLLM-Ascend, decode first, prefill when decode calls the metaserver
    PrefillFirst  vLLM-Ascend, prefill and then decode
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.support.metaserver import metaserver

Body = dict[str, Any]

MEDIA = ("image_url", "audio_url", "input_audio", "video_url")
CHAT = "/v1/chat/completions"
PREFILL_FIRST: Mapping[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@dataclass(frozen=True)
class Sent:
    """A reply: JSON, or the text of a stream."""

    status: int
    text: str

    @property
    def body(self) -> Any:
        return json.loads(self.text)


async def post(session: aiohttp.ClientSession, url: str, body: Body, request_id: str) -> Sent:
    async with session.post(url, json=body, headers={"x-request-id": request_id}) as response:
        return Sent(response.status, await response.text())


def of_one_token(body: Body, kv: Mapping[str, Any]) -> Body:
    """What each of them makes of a client's body for prefill."""
    short = {**body, "kv_transfer_params": dict(kv), "stream": False, "max_tokens": 1}
    short.pop("stream_options", None)
    if "max_completion_tokens" in short:
        short["max_completion_tokens"] = 1
    return short


@dataclass(frozen=True)
class Epd:
    """`prefill` empty: decode is combined with it."""

    session: aiohttp.ClientSession
    encode: str
    prefill: str
    decode: str

    async def ask(self, body: Body) -> Sent:
        request_id = uuid.uuid4().hex
        places = [
            (message, index, part)
            for message in body["messages"]
            if isinstance(message.get("content"), list)
            for index, part in enumerate(message["content"])
            if part.get("type") in MEDIA
        ]
        if places:
            body = await self._rewritten(body, places, request_id)
        if self.prefill:
            prefilled = await post(self.session, self.prefill + CHAT, of_one_token(body, PREFILL_FIRST), request_id)
            assert prefilled.status == 200, prefilled.text
            body = {**body, "kv_transfer_params": prefilled.body["kv_transfer_params"]}
        return await post(self.session, self.decode + CHAT, body, request_id)

    async def _rewritten(self, body: Body, places: list[tuple[Any, int, Any]], request_id: str) -> Body:
        """Media out, what the encoder says of them in; its handles go to prefill and to decode alike."""
        names = [hashlib.sha256(part["image_url"]["url"].encode()).hexdigest() for _, _, part in places]
        parts = [{**part, "uuid": name} for (_, _, part), name in zip(places, names, strict=True)]
        asked = {"model": body["model"], "messages": [{"role": "user", "content": parts}], "stream": False}
        encoded = await post(self.session, self.encode + CHAT, asked, f"{request_id}:0:{uuid.uuid4().hex[:6]}")
        assert encoded.status == 200, encoded.text
        entries = encoded.body["ec_transfer_params"]
        metadata = {index: entry["metadata"] for entry in entries.values() for index in entry["item_indices"]}
        rewritten = json.loads(json.dumps(body["messages"]))
        for number, (message, index, _) in enumerate(places):
            embeds = {"type": "image_embeds", "image_embeds": metadata[number], "uuid": names[number]}
            rewritten[body["messages"].index(message)]["content"][index] = embeds
        return {**body, "messages": rewritten, "ec_transfer_params": entries}


@dataclass(frozen=True)
class Layerwise:
    session: aiohttp.ClientSession
    prefill: str
    decode: str

    async def ask(self, body: Body, route: str = CHAT) -> Sent:
        name = str(uuid.uuid4())
        known = f"chatcmpl-{name}" if route == CHAT else f"cmpl-{name}-0"

        async def prefill(descriptor: dict[str, Any]) -> tuple[int, Any]:
            assert descriptor["request_id"] == known, descriptor
            short = {**of_one_token(body, descriptor), "min_tokens": 1}
            prefilled = await post(self.session, self.prefill + route, short, name)
            return (200, None) if prefilled.status == 200 else (502, {"detail": "the prefill request failed"})

        async with metaserver(prefill) as url:
            asked = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": url}
            return await post(self.session, self.decode + route, {**body, "kv_transfer_params": asked}, name)


@dataclass(frozen=True)
class PrefillFirst:
    session: aiohttp.ClientSession
    prefill: str
    decode: str

    async def ask(self, body: Body, route: str = CHAT) -> Sent:
        name = str(uuid.uuid4())
        short = {**of_one_token(body, PREFILL_FIRST), "min_tokens": 1}
        prefilled = await post(self.session, self.prefill + route, short, name)
        assert prefilled.status == 200, prefilled.text
        params = prefilled.body["kv_transfer_params"]
        return await post(self.session, self.decode + route, {**body, "kv_transfer_params": params}, name)
