"""What tells one family of vision-language models from another, for both engines. Loads no tensors.

A family stands here if both halves of it are known to be exact: a vision part whose embeddings of an item depend on
that item alone, and a text model whose layers take our attention and whose positions follow from token indices and
grids. Another one is a row here, and a checkpoint in the tests that proves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.errors import SetupError


@dataclass(frozen=True, slots=True)
class Family:
    """vision: transformers' class of the vision part, as module:class. media_tokens: what marks media in a prompt.

    mrope: positions have three rows, from the grids; else a token's position is its index.
    tiled: the vision part sees square tiles of one size, and an item's grid is (tiles, rows, columns of one tile);
    the tiles of a video are its frames.
    placeholders: what chat templates write for an image, and for a video.
    pads: the tokens that embeddings stand in for, each of them once in what a placeholder becomes.
    image: what an image becomes.   step: what each step in time of a video becomes, by its `number` from 1 and its
    `seconds`, and `between` two of them; None: a video becomes its placeholder.
    """

    vision: str
    media_tokens: tuple[str, ...]
    mrope: bool = True
    tiled: bool = False
    placeholders: tuple[str, str] = ("<|image_pad|>", "<|video_pad|>")
    pads: tuple[str, ...] = ("<|image_pad|>", "<|video_pad|>")
    image: str = "<|image_pad|>"
    step: str | None = None
    between: str = ""


_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
FAMILIES: Mapping[str, Family] = {
    "qwen2_vl": Family("qwen2_vl.modeling_qwen2_vl:Qwen2VisionTransformerPretrainedModel", _QWEN_TOKENS),
    "qwen2_5_vl": Family("qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VisionTransformerPretrainedModel", _QWEN_TOKENS),
    "qwen3_vl": Family(
        "qwen3_vl.modeling_qwen3_vl:Qwen3VLVisionModel",
        _QWEN_TOKENS,
        step="<{seconds:.1f} seconds><|vision_start|><|video_pad|><|vision_end|>",
    ),
    "internvl": Family(
        "internvl.modeling_internvl:InternVLModel",
        ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        mrope=False,
        tiled=True,
        placeholders=("<IMG_CONTEXT>", "<video>"),
        pads=("<IMG_CONTEXT>",),
        image="<img><IMG_CONTEXT></img>",
        step="Frame{number}: <img><IMG_CONTEXT></img>",
        between="\n",
    ),
}


def family_of(folder: Path | str, config: Any) -> Family:
    """Raises SetupError, naming those that are known."""
    known = FAMILIES.get(config.model_type)
    if known is None:
        raise SetupError(f"--model {folder}: {config.model_type!r} is not served; known: {', '.join(FAMILIES)}")
    return known


def merge_size(config: Any) -> int:
    """How many patches each way become one token."""
    ratio: float = getattr(config, "downsample_ratio", 0.0) or 1 / config.vision_config.spatial_merge_size
    return round(1 / ratio)
