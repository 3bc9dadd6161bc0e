"""The encoder as users run it: a process, real images over HTTP, embeddings read by another process, SIGTERM."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers.image_utils import load_image

from engines.transfer import create
from tests.support.checkpoints import FAMILIES, checkpoint
from tests.support.pictures import image_file, image_part
from tests.support.reference import reference

PICTURES = [
    image_file(96, 64, seed=1),
    image_file(200, 130, seed=2, format="JPEG"),
    image_file(70, 90, seed=3, format="WEBP"),
]


class Engine:
    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url

    def request(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def encode(self, *parts: dict[str, Any], **extra: Any) -> tuple[int, dict[str, Any]]:
        return self.request("/v1/chat/completions", {"messages": [{"role": "user", "content": list(parts)}], **extra})


@contextmanager
def encoder(family: str, *flags: str) -> Iterator[Engine]:
    """A running encoder; leaving the block sends SIGTERM and expects a clean end."""
    command = [sys.executable, "-m", "engines.encoder", "--model", str(checkpoint(family)), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--cache-bytes", "16MiB", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert ready.startswith("READY "), process.communicate(timeout=30)[1]
        yield Engine(process, ready.split()[1])
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        assert "Traceback" not in err
    finally:
        process.kill()
        process.communicate()
    assert not list(Path("/dev/shm").glob(f"triptych-*-{process.pid}-*"))


@torch.inference_mode()
def expected(family: str, data: bytes) -> torch.Tensor:
    """What the whole reference model makes of one image: main features, then each deepstack level."""
    images = reference(family).images(images=[load_image(Image.open(BytesIO(data)))], return_tensors="pt")
    out = reference(family).model.get_image_features(images["pixel_values"], images["image_grid_thw"])
    levels = [out.pooler_output[0], *(level[0] for level in getattr(out, "deepstack_features", None) or ())]
    return torch.cat(levels, dim=-1)


async def fetched(entry: dict[str, Any]) -> torch.Tensor:
    """The embedding behind a handle, read as an engine reads it."""
    rows, width = entry["shape"]
    nbytes = rows * width * 4
    transfer = create("shm")
    try:
        arena = transfer.allocate("embeddings", nbytes)
        await transfer.start()
        ticket = transfer.reserve(arena, [(0, nbytes)], timeout=10.0, on_free=lambda: None)
        await ticket.fetch(entry["where"])
        got = torch.frombuffer(arena.buffer, dtype=torch.float32).clone()
        ticket.release()
    finally:
        await transfer.close()
    return got[: rows * width].view(rows, width)


@pytest.mark.parametrize("family", FAMILIES)
async def test_embeddings_over_shm_equal_the_reference(family: str) -> None:
    with encoder(family) as engine:
        for data in PICTURES:  # one by one: the very same arithmetic, so the very same bits
            status, reply = engine.encode(image_part(data))
            assert status == 200, reply
            (entry,) = reply["ec_transfer_params"].values()
            assert torch.equal(await fetched(entry), expected(family, data))
        status, reply = engine.encode(*(image_part(data) for data in (*PICTURES, PICTURES[0])))
        assert [entry["item_indices"] for entry in reply["ec_transfer_params"].values()] == [[0, 3], [1], [2]]
        batch = [image_file(60 + 30 * n, 90, seed=10 + n) for n in range(6)]
        _, reply = engine.encode(*(image_part(data) for data in batch))
        for data, entry in zip(batch, reply["ec_transfer_params"].values(), strict=True):
            torch.testing.assert_close(await fetched(entry), expected(family, data), rtol=1e-5, atol=1e-5)
        bad = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(b"x").decode()}}
        status, reply = engine.encode(image_part(PICTURES[0]), bad)
        assert (status, reply["error"]["param"]) == (400, "messages[0].content[1]")
        info = engine.request("/info")[1]
        assert info["cache"]["items"] == len(PICTURES) + len(batch)
        assert all("visual" in prefix.split(".") for prefix in info["weights"]["prefixes"])
        stored = sum(file.stat().st_size for file in checkpoint(family).glob("*.safetensors"))
        assert 0 < info["weights"]["bytes"] < stored


def test_storage_is_the_layout_that_vllm_reads_and_sigterm_lets_requests_finish(tmp_path: Path) -> None:
    replies: list[tuple[int, Any]] = []
    family, uuid = "qwen2_vl", "ab" * 32
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(PICTURES[0])
    url = (tmp_path / "pictures" / "a.png").as_uri()
    shared = tmp_path / "shared"
    flags = [
        "--transfer",
        "storage",
        "--storage-path",
        str(shared),
        "--allowed-media-roots",
        str(tmp_path / "pictures"),
    ]
    with encoder(family, *flags) as engine:
        status, reply = engine.encode({"type": "image_url", "image_url": {"url": url}, "uuid": uuid})
        assert status == 200, reply
        assert list(reply["ec_transfer_params"]) == [uuid]
        stored = load_file(shared / uuid / "encoder_cache.safetensors")
        assert list(stored) == ["ec_cache"]
        assert torch.equal(stored["ec_cache"], expected(family, PICTURES[0]))
        late = threading.Thread(target=lambda: replies.append(engine.encode(image_part(image_file(800, 600, seed=5)))))
        late.start()
        while late.is_alive() and not engine.request("/info")[1]["queue"]["items"]:
            pass
    late.join(timeout=30)
    assert [status for status, _ in replies] == [200], "SIGTERM lets requests in flight finish"
