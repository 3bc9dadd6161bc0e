"""Every path and order over real sockets: what each engine was sent, and what the client got."""

from __future__ import annotations

import pytest
from blake3 import blake3

from tests.fakes.deployment import deployment
from tests.fakes.media import chat, image, part
from tests.fakes.native import PIECES

TEXT = "".join(PIECES)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("topology", "handoff", "media", "path"),
    [
        ("1b", "push", False, "PD"),
        ("1e1b", "push", True, "E-PD"),
        ("1p1d", "push", False, "P-D"),
        ("1p1d", "pull", False, "P-D"),
        ("1e1p1d", "push", True, "E-P-D"),
        ("1e1p1d", "pull", True, "E-P-D"),
    ],
)
async def test_every_path_serves(topology: str, handoff: str, media: bool, path: str, stream: bool) -> None:
    async with deployment(topology, handoff) as d:
        parts = [part(image())] if media else []
        answer = await d.post(chat(*parts, stream=stream), x_request_id="me-1")
        assert answer.status == 200, answer.body
        assert answer.headers["x-request-id"] == "me-1"
        assert answer.route.startswith(f"{path}; ")
        last = (d.decodes or d.combined)[0]
        if stream:
            assert answer.body == last.streamed
            assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        else:
            assert answer.json["choices"][0]["message"]["content"] == TEXT
        assert all(call.id in ("me-1", "me-1:0") for engine in d.engines for call in engine.calls)
        assert all(len(engine.calls) == 1 for engine in d.engines)


async def test_media_leave_the_body_of_prefill_and_decode() -> None:
    data = image()
    mm_hash = blake3(data).hexdigest()
    async with deployment("1e1p1d", "push") as d:
        await d.post(chat(part(data), unknown={"z": 1, "a": 2}))
        prefill, decode = d.prefills[0].calls[0].body, d.decodes[0].calls[0].body
        for body in (prefill, decode):
            embeds = body["messages"][0]["content"][1]
            assert embeds["type"] == "image_embeds"
            assert embeds["uuid"] == mm_hash
            assert embeds["image_embeds"]["image_grid_thw"][2] == 8
            assert body["unknown"] == {"z": 1, "a": 2}
        assert prefill["ec_transfer_params"][mm_hash]["where"] == {"at": d.encoders[0].netloc}
        assert "ec_transfer_params" not in decode
        assert prefill["kv_transfer_params"]["offer"] == {"ticket": d.decodes[0].calls[0].id}
        assert (prefill["max_tokens"], prefill["min_tokens"], prefill["stream"]) == (1, 1, False)
        assert decode["kv_transfer_params"]["metaserver"] == f"{d.url}/v1/metaserver"
