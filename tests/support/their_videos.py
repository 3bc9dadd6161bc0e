"""The rules of transformers' video processors, out of their own source: to import that, torchvision would be needed."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from transformers.image_utils import SizeDict
from transformers.video_utils import VideoMetadata

_FILES = {"qwen2_vl": "qwen2_vl", "qwen2_5_vl": "qwen2_vl", "qwen3_vl": "qwen3_vl", "internvl": "internvl"}
_NAMES = ("smart_resize", "sample_frames", "resize", "patchify")


@cache
def functions(family: str) -> Mapping[str, Callable[..., Any]]:
    """Those of `_NAMES` that the family's processor has, methods as plain functions; `resize` gives the size alone."""
    name = _FILES[family]
    source = (Path(transformers.__file__).parent / f"models/{name}/video_processing_{name}.py").read_text()
    tree = ast.parse(source.replace("super().resize(", "_resized("))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in _NAMES]
    for node in found:
        node.decorator_list = []
    space: dict[str, Any] = {"math": math, "np": np, "torch": torch, "SizeDict": SizeDict, "_resized": _resized}
    flags = annotations.compiler_flag
    exec(compile(ast.Module(found, []), str(name), "exec", flags), space)
    return {node.name: space[node.name] for node in found}


def _resized(image: torch.Tensor, size: SizeDict, resample: Any) -> tuple[int, int]:
    return size.height, size.width


class Processor:
    """One with these settings, as far as its rules go."""

    def __init__(self, family: str, **settings: Any) -> None:
        self._functions = functions(family)
        given = {"num_frames": None, "fps": None, "max_video_tokens": None, **settings}
        self.settings = SimpleNamespace(**given)

    def indices(self, frames: int, rate: float, **asked: Any) -> list[int]:
        metadata = VideoMetadata(total_num_frames=frames, fps=rate)
        return [int(n) for n in self._functions["sample_frames"](self.settings, metadata=metadata, **asked)]

    def size(self, frames: int, height: int, width: int, bounds: Mapping[str, int], cap: bool) -> tuple[int, int]:
        its = self.settings
        video = SimpleNamespace(shape=(1, frames, 3, height, width))
        factor, step = its.patch_size * its.merge_size, its.temporal_patch_size
        found = self._functions["resize"](its, video, SizeDict(**bounds), None, factor, step, cap_pixels_per_frame=cap)
        return int(found[0]), int(found[1])

    def patches(self, video: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Of [frames, 3, height, width]."""
        its = self.settings
        patch = self._functions["patchify"]
        out, *grid = patch(its, video[None], its.patch_size, its.merge_size, its.temporal_patch_size)
        return out[0], (grid[0], grid[1], grid[2])
