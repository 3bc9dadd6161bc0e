"""What one `transformers` model says of videos, given the pixels of ours.

Its own processors of videos need torchvision: their rules are held against ours in tests/engines/encoder. What stands
around the pixels, tokens and times, is made here as those processors make it, and by nothing of the engines.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.image_utils import load_image

from engines.encoder.cutting import Prepared
from engines.encoder.video import VideoReader
from engines.settings import EncoderSettings
from tests.support.checkpoints import checkpoint
from tests.support.reference import reference

_BLANK = "<|placeholder|>"


@cache
def reader(family: str) -> VideoReader:
    return VideoReader(checkpoint(family), EncoderSettings(model=Path("m")))


def answer(family: str, messages: Sequence[dict[str, Any]], media: Sequence[tuple[str, bytes]], max_tokens: int) -> str:
    """The greedy answer to messages of text, image and video parts; `media` are (modality, file) in their order."""
    whole = reference(family)
    text = whole.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    make = _tiled if family == "internvl" else _gridded
    tokens = whole.generate(make(family, text, media), max_tokens)
    return str(whole.tokenizer.decode(tokens, skip_special_tokens=True))


def _gridded(family: str, text: str, media: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
    whole, found = reference(family), {}
    images = [load_image(Image.open(io.BytesIO(data))) for kind, data in media if kind == "image"]
    if images:
        found = dict(whole.images(images=images, return_tensors="pt"))
        for grid in found["image_grid_thw"]:
            text = text.replace("<|image_pad|>", _BLANK * _tokens(grid), 1)
        text = text.replace(_BLANK, "<|image_pad|>")
    films = [reader(family).read(data, {}, {}) for kind, data in media if kind == "video"]
    for film in films:
        text = text.replace("<|video_pad|>", _in_steps(film) if family == "qwen3_vl" else _BLANK * film.tokens, 1)
    if films:
        found["pixel_values_videos"] = torch.cat([film.pixels for film in films])
        found["video_grid_thw"] = torch.tensor([film.grid for film in films])
        if family == "qwen2_5_vl":
            found["second_per_grid_ts"] = torch.tensor([film.clip.spacing for film in films])
    ids = whole.tokenizer(text.replace(_BLANK, "<|video_pad|>"), return_tensors="pt")["input_ids"]
    config = whole.model.config
    types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **found}


def _in_steps(film: Prepared) -> str:
    t, h, w = film.grid
    own = f"<|vision_start|>{_BLANK * _tokens((1, h, w))}<|vision_end|>"
    return "".join(f"<{film.clip.timestamps[step]:.1f} seconds>{own}" for step in range(t))


def _tokens(grid: Any) -> int:
    return math.prod(int(n) for n in grid) // 4


def _tiled(family: str, text: str, media: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
    whole, pixels = reference(family), []
    images, films = ([data for kind, data in media if kind == modality] for modality in ("image", "video"))
    kinds = iter([kind for kind, _ in media])
    for kind in kinds:
        if kind == "image":
            picture = load_image(Image.open(io.BytesIO(images.pop(0))))
            out = whole.images(images=[picture], crop_to_patches=True, return_tensors="pt")["pixel_values"]
            text = text.replace("<IMG_CONTEXT>", f"<img>{_BLANK * (16 * len(out))}</img>", 1)
        else:
            out = reader(family).read(films.pop(0), {}, {}).pixels
            frames = (f"Frame{n + 1}: <img>{_BLANK * 16}</img>" for n in range(len(out)))
            text = text.replace("<video>", "\n".join(frames), 1)
        pixels.append(out)
    ids = whole.tokenizer(text.replace(_BLANK, "<IMG_CONTEXT>"), return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.cat(pixels)}
