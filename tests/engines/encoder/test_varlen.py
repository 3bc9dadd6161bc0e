"""One kernel call a layer, told of every frame, gives what attention frame by frame gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from engines.encoder import model as vision
from engines.encoder import varlen
from engines.encoder.cutting import Prepared
from engines.encoder.model import VisionModel
from tests.support.checkpoints import FAMILIES, checkpoint


@dataclass
class StandIn:
    """Has the signature of torch's `varlen_attn` and does the same in plain torch. Keeps the lengths of each call."""

    calls: list[list[int]] = field(default_factory=list)

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and cu_seq_q.equal(cu_seq_k)
        assert all(type(most) is int for most in (max_q, max_k)) and window_size == (-1, -1)
        lengths = cu_seq_q.diff().tolist()
        assert cu_seq_q[0] == 0 and cu_seq_q[-1] == len(query) == len(key) == len(value)
        assert max_q == max_k == max(lengths) and min(lengths) > 0
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        self.calls.append(lengths)
        out = torch.empty_like(query)
        for a, b in pairwise(cu_seq_q.tolist()):
            one, keys, values = (tensor[a:b].transpose(0, 1)[None] for tensor in (query, key, value))
            out[a:b] = scaled_dot_product_attention(one, keys, values, scale=scale)[0].transpose(0, 1)
        return out


GRIDS = [(1, 4, 6), (2, 8, 4), (1, 18, 22)]
"""An image, a video of two steps, and an image of more windows than one."""


def items(family: VisionModel) -> list[Prepared]:
    width = 3 * 2 * family.numbers()["vision_config"]["patch_size"] ** 2
    some = torch.Generator().manual_seed(5)
    return [Prepared(torch.randn(t * h * w, width, generator=some), (t, h, w), t * h * w // 4) for t, h, w in GRIDS]


def encoded(model: VisionModel, batch: list[Prepared]) -> list[torch.Tensor]:
    outputs = [torch.full((item.tokens, model.width), float("nan")) for item in batch]
    model.encode(batch, outputs)
    return outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_by_the_kernel_is_a_batch_frame_by_frame(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, kernel = VisionModel.load(checkpoint(family)), StandIn()
    name = varlen.registered(f"test_flash_{family}", kernel)
    monkeypatch.setattr(vision, "implementation", lambda *_: name)
    model = VisionModel.load(checkpoint(family))
    batch = items(plain)
    for got, wanted in zip(encoded(model, batch), encoded(plain, batch), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    frames = [h * w for t, h, w in GRIDS for _ in range(t)]
    assert len(kernel.calls) == plain.numbers()["vision_config"]["depth"], "one call for each layer"
    assert frames in kernel.calls and all(sum(lengths) == sum(frames) for lengths in kernel.calls)
    windowed = [lengths for lengths in kernel.calls if lengths != frames]
    assert bool(windowed) == (family == "qwen2_5_vl")
    assert all(len(lengths) > len(frames) for lengths in windowed)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_follows_from_grids_is_told_and_a_tower_looks_at_none(family: str) -> None:
    """On a device, a look at a grid would wait for all that is queued there."""
    model = VisionModel.load(checkpoint(family))
    module: Any = model._tower.module
    told = varlen.told(module, GRIDS, torch.device("cpu"))
    out = module(torch.cat([item.pixels for item in items(model)]), grid_thw=None, return_dict=True, **told)
    wanted = encoded(model, items(model))
    assert out.pooler_output.allclose(torch.cat(wanted)[:, : out.pooler_output.shape[1]], atol=1e-5)


@pytest.mark.parametrize(
    ("device", "dtype", "at_once"),
    [("cuda", "bfloat16", True), ("cuda:1", "float16", True), ("cuda", "float32", False), ("cpu", "bfloat16", False)],
)
def test_the_kernel_is_for_sixteen_bits_on_cuda(device: str, dtype: str, at_once: bool) -> None:
    name = varlen.implementation(torch.device(device), getattr(torch, dtype))
    assert (name != "sdpa") == at_once
