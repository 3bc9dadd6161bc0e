"""The true shapes of the models that the benchmarks stand for, what a forward of them must compute and read, and what
devices can do. Arithmetic alone: it makes no tensor and measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, Qwen2_5_VLConfig, Qwen3VLConfig

WINDOW_PATCHES = 64
"""Patches that one window of a windowed tower holds: 112 pixels each way, 14 a patch."""


@dataclass(frozen=True, slots=True)
class Peak:
    """What a device does at most: dense 16-bit FLOP/s, and bytes/s of its memory."""

    flops: float
    bandwidth: float


PEAKS: Mapping[str, Peak] = {
    "H200": Peak(989e12, 4.8e12),
    "H100 PCIe": Peak(756e12, 2.0e12),
    "H100": Peak(989e12, 3.35e12),
    "A100": Peak(312e12, 2.0e12),
}
"""By a part of the device's name, the longer before the shorter; vendors' figures, SXM where nothing is said."""


def peak_of(device: str) -> Peak:
    """:raises LookupError: nothing is known of a device of that name."""
    for name, peak in PEAKS.items():
        if name in device:
            return peak
    raise LookupError(f"what {device} can do is not known; say it with --peak-tflops and --peak-gbytes")


def qwen2_5_vl(
    hidden: int, layers: int, heads: tuple[int, int], inner: int, vocabulary: int, tied: bool
) -> PretrainedConfig:
    """`heads` are those of queries and of keys."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
    }
    vision = {"hidden_size": 1280, "out_hidden_size": hidden}  # the rest is what the class says itself
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


def qwen3_vl(hidden: int, layers: int, heads: tuple[int, int], inner: int) -> PretrainedConfig:
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 128,
        "intermediate_size": inner,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    }
    return Qwen3VLConfig(text_config=text, vision_config={"out_hidden_size": hidden})


def configs() -> dict[str, PretrainedConfig]:
    return {
        "Qwen2.5-VL-3B": qwen2_5_vl(2048, 36, (16, 2), 11008, 151936, tied=True),
        "Qwen2.5-VL-7B": qwen2_5_vl(3584, 28, (28, 4), 18944, 152064, tied=False),
        "Qwen3-VL-8B": qwen3_vl(4096, 36, (32, 8), 12288),
    }


# -- the tower ---------------------------------------------------------------------------------------------------------


def grid_of(width: int, height: int, config: Any) -> tuple[int, int, int]:
    """(t, h, w) in patches of an image that is neither too small nor too large for the processor."""
    vision = config.vision_config
    unit = vision.patch_size * vision.spatial_merge_size
    return (1, *(round(side / unit) * vision.spatial_merge_size for side in (height, width)))


def tower_flops(grid: tuple[int, int, int], config: Any) -> float:
    """One image: linear layers of all patches, attention of each to what it sees, and the mergers.

    Qwen2.5-VL sees windows but for a few layers, Qwen3-VL everything; its deepstack levels have a merger each.
    """
    vision = config.vision_config
    patches, width, inner = grid[0] * grid[1] * grid[2], vision.hidden_size, vision.intermediate_size
    windowed = hasattr(vision, "fullatt_block_indexes")
    full = len(vision.fullatt_block_indexes) if windowed else vision.depth
    linear = vision.depth * (4 * width**2 + (3 if windowed else 2) * width * inner) * 2 * patches
    attention = 4 * width * patches * (full * patches + (vision.depth - full) * WINDOW_PATCHES)
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    merged, wide = patches // vision.spatial_merge_size**2, width * vision.spatial_merge_size**2
    return float(linear + attention + mergers * merged * (wide**2 + wide * vision.out_hidden_size) * 2)


# -- the language model ------------------------------------------------------------------------------------------------


def layer_weights(text: Any) -> tuple[int, int]:
    """Of one layer: attention's and the MLP's."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention: int = 2 * text.hidden_size * head * (text.num_attention_heads + text.num_key_value_heads)
    return attention, 3 * text.hidden_size * text.intermediate_size


def prefill_flops(tokens: int, config: Any) -> float:
    """A prompt from its first token on, causal, with the logits of its last alone: no MLP of the last layer but for
    that token, and no attention there either.
    """
    text = config.text_config
    attention, mlp = layer_weights(text)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    linear = 2 * tokens * (text.num_hidden_layers * attention + (text.num_hidden_layers - 1) * mlp)
    seen = 2 * tokens**2 * text.num_attention_heads * head * (text.num_hidden_layers - 1)
    return float(linear + seen + 2 * text.vocab_size * text.hidden_size)


def weight_nbytes(config: Any, itemsize: int) -> int:
    """What a decode step reads whatever its batch: every layer and the head, of the embedding only some rows."""
    text = config.text_config
    weights: int = text.num_hidden_layers * sum(layer_weights(text)) + text.vocab_size * text.hidden_size
    return weights * itemsize


def kv_nbytes(config: Any, itemsize: int) -> int:
    """Of one token in all layers."""
    text = config.text_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * int(text.num_hidden_layers) * int(text.num_key_value_heads) * int(head) * itemsize


def decode_floor(batch: int, context: int, config: Any, itemsize: int, peak: Peak) -> float:
    """Seconds in which a step of `batch` sequences of `context` tokens can at best be over: the roofline."""
    read = weight_nbytes(config, itemsize) + batch * context * kv_nbytes(config, itemsize)
    flops = 2 * batch * weight_nbytes(config, 1)
    return max(read / peak.bandwidth, flops / peak.flops)
