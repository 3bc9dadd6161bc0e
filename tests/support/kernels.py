"""Stands for `torch.nn.attention.varlen.varlen_attn` on the CPU, in any dtype: written out, and as strict as the kernel
about what it is given.
"""

from __future__ import annotations

import torch


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    count = len(cu_seq_q) - 1
    assert cu_seq_k is not None
    for index in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert index is None or (index.dtype == torch.int32 and index.is_contiguous())
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert enable_gqa
    assert window_size in ((-1, -1), (-1, 0))
    assert cu_seq_q[-1] == len(query)
    assert len(cu_seq_k) == count + 1
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for n in range(count):
        rows = slice(int(cu_seq_q[n]), int(cu_seq_q[n + 1]))
        if block_table is None:
            held = slice(int(cu_seq_k[n]), int(cu_seq_k[n + 1]))
            keys, values = key[held], value[held]
        else:
            assert seqused_k is not None
            length = int(seqused_k[n])
            assert length == cu_seq_k[n + 1] - cu_seq_k[n]
            pages = block_table[n, : -(-length // key.shape[1])].long()
            keys, values = (pool[pages].flatten(0, 1)[:length] for pool in (key, value))
        assert len(query[rows]) <= max_q
        assert len(keys) <= max_k
        out[rows] = attend(query[rows], keys, values, scale or query.shape[-1] ** -0.5, window_size == (-1, 0))
    return out


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    """`[rows, heads, head_dim]`; causal: the last row sees every key."""
    share = query.shape[1] // keys.shape[1]
    keys, values = (part.repeat_interleave(share, 1) for part in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
    if causal:
        later = torch.arange(len(keys)) > torch.arange(len(keys) - len(query), len(keys))[:, None]
        scores = scores.masked_fill(later, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
