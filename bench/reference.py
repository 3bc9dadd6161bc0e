"""What one `transformers` model says: the answer that every topology must equal token by token."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.image_utils import load_image
from transformers.utils.logging import disable_progress_bar


@dataclass(frozen=True)
class Reference:
    """One float32 model with its tokenizer and image processor, driven as its model card would."""

    model: Any
    tokenizer: Any
    images: Any

    def inputs(self, messages: Sequence[dict[str, Any]], images: Sequence[bytes] = ()) -> dict[str, torch.Tensor]:
        """Token ids with expanded image placeholders, and pixels; `images` are file bytes in the order of the parts."""
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        tiles = {"crop_to_patches": True} if self.model.config.model_type == "internvl" else {}
        if not images:
            ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
            types = {} if tiles else {"mm_token_type_ids": torch.zeros_like(ids)}
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types}
        pictures = [load_image(Image.open(io.BytesIO(data))) for data in images]
        pixels = self.images(images=pictures, return_tensors="pt", **tiles)
        if tiles:
            return self._tiled(text, pixels)
        pad = "<|image_pad|>"
        for grid in pixels["image_grid_thw"]:
            count = int(grid.prod()) // self.images.merge_size**2
            text = text.replace(pad, "<|placeholder|>" * count, 1)
        ids = self.tokenizer(text.replace("<|placeholder|>", pad), return_tensors="pt")["input_ids"]
        types = (ids == self.model.config.image_token_id).int()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **pixels}

    def _tiled(self, text: str, pixels: Any) -> dict[str, torch.Tensor]:
        """As transformers' processor of InternVL does: so many tokens for each tile, between two that mark an image."""
        vision = self.model.config.vision_config
        patches = vision.image_size[0] // vision.patch_size[0] * (vision.image_size[1] // vision.patch_size[1])
        each = int(patches * self.model.config.downsample_ratio**2)
        for tiles in pixels.pop("num_patches"):
            text = text.replace("<IMG_CONTEXT>", f"<img>{'<|placeholder|>' * (int(tiles) * each)}</img>", 1)
        ids = self.tokenizer(text.replace("<|placeholder|>", "<IMG_CONTEXT>"), return_tensors="pt")["input_ids"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels["pixel_values"]}

    @torch.inference_mode()
    def generate(self, inputs: dict[str, torch.Tensor], max_tokens: int, **options: Any) -> list[int]:
        """Greedy continuation, end-of-sequence token included when it came."""
        out = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, **options)
        tokens: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
        return tokens

    def answer(self, messages: Sequence[dict[str, Any]], images: Sequence[bytes] = (), max_tokens: int = 16) -> str:
        """The text of the greedy continuation, special tokens left out."""
        tokens = self.generate(self.inputs(messages, images), max_tokens)
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def load_reference(folder: Path) -> Reference:
    """Load the whole model of a checkpoint folder in float32."""
    disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return Reference(model, AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder))
