"""Attention over a row of patches in which every frame sees itself alone, by one kernel call, and what the tower has to
know of a batch, computed where the grids are. For 16-bit CUDA; elsewhere transformers attends frame by frame.

    patches   | image 0      | image 1, frame 0 | image 1, frame 1 |
    cu_seqlens  0              n0                 n0 + n1            n0 + 2 · n1

Left to itself a tower reads its grids from the device again and again, and each time the host waits for all that the
device has still to do. All numbers that follow from grids are computed on the host instead and sent ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, vision_utils
from transformers.utils.generic import get_max_seqlen

from engines.devices import onto

Kernel = Callable[..., Any]
"""Of the signature of `torch.nn.attention.varlen.varlen_attn`."""


def implementation(device: torch.device, dtype: torch.dtype) -> str:
    """The `attn_implementation` of a tower there: the kernel is for 16 bits on CUDA."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return registered("triptych_flash_varlen", varlen_attn)
    return "sdpa"


def registered(name: str, kernel: Kernel) -> str:
    """`name`, by which transformers finds the kernel. Only what has `flash` in its name is told where frames end."""
    AttentionInterface.register(name, partial(attend, kernel))
    return name


def attend(
    kernel: Kernel,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Query, key and value `[1, heads, patches, head_dim]` → `[1, patches, heads, head_dim]`."""
    row = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = kernel(*row, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling)
    return out[None], None


def told(module: Any, grids: list[tuple[int, int, int]], device: torch.device) -> dict[str, Any]:
    """What the tower `module` takes instead of computing it itself, for items of these (t, h, w), on `device`."""
    config, merge = module.config, module.spatial_merge_size
    grid_thw = torch.tensor(grids)
    cu_seqlens = vision_utils.get_vision_cu_seqlens(grid_thw)
    tensors = {
        "cu_seqlens": cu_seqlens,
        "position_ids": vision_utils.get_vision_position_ids(grid_thw, merge),
    }
    longest = {"max_seqlen": get_max_seqlen(cu_seqlens, config)}
    if hasattr(module, "window_size"):
        index, cu_windows = vision_utils.get_vision_window_index(grid_thw, merge, module.window_size, module.patch_size)
        tensors |= {"window_index": index, "cu_window_seqlens": cu_windows}
        longest["max_window_seqlen"] = get_max_seqlen(cu_windows, config)
    if hasattr(module, "num_grid_per_side"):
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid_thw,
            num_grid_per_side=module.num_grid_per_side,
            mode=module.interpolation_mode,
            align_corners=module.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        tensors |= {"interp_indices": indices, "interp_weights": weights}
    return {**longest, **{name: onto(tensor.numpy(), device) for name, tensor in tensors.items()}}
