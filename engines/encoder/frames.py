"""Which frames of a video its model sees, how large, and as which patches: as transformers' video processors have it.

Those need torchvision, which is not here; what they compute is, and tests hold each rule against theirs. It decodes no
bytes and keeps no time.

    film       0 1 2 3 4 5 6 7 8 9 …       all frames of the file, in the order they are shown
    chosen     0     3     6     9 …       `choose`
    steps     (0     3)   (6     9) …      temporal patches, of 2 frames in the Qwen-VL families; else a frame is one
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from engines.errors import BadRequest, SetupError
from engines.families import merge_size

FILES = ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")
_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_MODES = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_ASPECT = 200  # where the Qwen processors give up


@dataclass(frozen=True, slots=True)
class Film:
    """What is known of a video before its frames: how many, how many a second, and their size in pixels."""

    frames: int
    fps: float
    width: int
    height: int

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


@dataclass(frozen=True, slots=True)
class Clip:
    """When the steps of a video are: the middle of each in seconds from its start, and how far they are apart."""

    timestamps: tuple[float, ...]
    spacing: float


class FilmCutter(Protocol):
    """One checkpoint's rules. Thread-safe."""

    def numbers(self) -> dict[str, Any]:
        """How videos are sampled and sized, as the processor's file says it. JSON."""
        ...

    def choose(self, film: Film, sampling: Mapping[str, float]) -> list[int]:
        """The frames to see, in order, at least one. `sampling`: a request's own {"fps"} or {"num_frames"}; empty: the
        checkpoint's. Of a video with fewer frames than asked for, all of them."""
        ...

    def size(self, film: Film, count: int, bounds: Mapping[str, int]) -> tuple[int, int]:
        """(height, width) that each of `count` chosen frames is resized to, in `bounds` as for images. Raises
        BadRequest."""
        ...

    def grid(self, count: int, size: tuple[int, int]) -> tuple[int, int, int]:
        """(t, h, w) in patches of that many frames of that size."""
        ...

    def clip(self, film: Film, chosen: list[int]) -> Clip: ...

    def resize(self, frame: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """One frame, [3, height, width] of uint8."""
        ...

    def cut(self, frames: torch.Tensor) -> torch.Tensor:
        """Pixels for the tower, as `cutting.Prepared` has them, out of [frames, 3, height, width] of uint8."""
        ...


def film_cutter_of(folder: Path, config: Any) -> FilmCutter:
    """Raises SetupError for a family whose videos are not known, or whose processor's files say something else."""
    make = _CUTTERS.get(config.model_type)
    if make is None:
        raise SetupError(f"--model {folder}: videos of {config.model_type!r} are not known")
    return make(processor_file(folder), config)


def processor_file(folder: Path) -> dict[str, Any]:
    """What the checkpoint says of its video processor, in the file that transformers would take; that of its images
    stands in for it."""
    for name in FILES:
        path = folder / name
        content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        found: dict[str, Any] = content.get("video_processor", {}) if name == FILES[0] else content
        if found:
            return found
    return {}


class _Cutter:
    """What the families have in common: how a frame is resized, and how its numbers are scaled."""

    def __init__(self, said: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._told = {**defaults, **{name: value for name, value in said.items() if value is not None}}
        mode = _MODES.get(self._told.get("resample", 3))
        if mode is None:
            raise SetupError(
                f"the video processor resizes by Pillow's filter {self._told['resample']}: 2 and 3 are known"
            )
        self._mode = mode
        # The mean and the deviation rescale too, as in transformers' fast processors: the same numbers in float32.
        scale = 1.0 / self._told.get("rescale_factor", 1 / 255)
        self._mean = (torch.tensor(self._told["image_mean"]) * scale).view(3, 1, 1)
        self._std = (torch.tensor(self._told["image_std"]) * scale).view(3, 1, 1)

    def resize(self, frame: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        if frame.shape[1:] == size:
            return frame
        # In uint8, as torchvision does it: another rounding than through float32.
        return functional.interpolate(frame[None], size, mode=self._mode, align_corners=False, antialias=True)[0]

    def _normalised(self, frames: torch.Tensor) -> torch.Tensor:
        return frames.to(torch.float32).sub_(self._mean).div_(self._std)


class GridFilms(_Cutter):
    """Frames in patches of their own size, two by two in time (Qwen-VL). `together`: the bounds of pixels are those of
    all frames together, and any number of frames may be chosen (Qwen3-VL)."""

    def __init__(self, said: Mapping[str, Any], config: Any, *, together: bool, defaults: Mapping[str, Any]) -> None:
        common = {"temporal_patch_size": 2, "merge_size": 2, "min_frames": 4, "max_frames": 768, "fps": 2}
        super().__init__(said, {**common, **defaults})
        told = self._told
        self._together = together
        self._patch: int = told["patch_size"]
        self._merge: int = told["merge_size"]
        self._temporal: int = told["temporal_patch_size"]
        size = {**defaults["size"], **told["size"]}
        self._bounds = {
            "shortest_edge": told.get("min_pixels", size["shortest_edge"]),
            "longest_edge": told.get("max_pixels", size["longest_edge"]),
        }

    def numbers(self) -> dict[str, Any]:
        names = ("temporal_patch_size", "fps", "num_frames", "min_frames", "max_frames")
        return {"size": self._bounds, **{name: self._told[name] for name in names if name in self._told}}

    def choose(self, film: Film, sampling: Mapping[str, float]) -> list[int]:
        fps, asked = sampling.get("fps"), sampling.get("num_frames")
        if fps is None and asked is None:
            asked = self._told.get("num_frames")
            fps = self._told["fps"] if asked is None else None
        least, most, total = self._told["min_frames"], self._told["max_frames"], film.frames
        if self._together:
            count = int(asked or min(max(int(total / film.fps * float(fps or 0)), least), most))
            return [int(n) for n in np.linspace(0, total - 1, min(count, total)).round()]
        if total < self._temporal:
            return list(range(total))
        step = self._temporal
        if asked is not None:
            count = max(1, round(asked / step)) * step
        else:
            wanted = min(max(total / film.fps * float(fps or 0), least), most // step * step, total)
            count = math.floor(wanted / step) * step
        count = max(step, min(count, total // step * step))
        return _spread(0, total, count)

    def size(self, film: Film, count: int, bounds: Mapping[str, int]) -> tuple[int, int]:
        low, high = ({**self._bounds, **bounds}[edge] for edge in ("shortest_edge", "longest_edge"))
        count = max(count, self._temporal)
        side = self._patch * self._merge
        if self._told.get("cap_pixels_per_frame"):
            high = self._capped(count, side, low, high)
        height, width = film.height, film.width
        if self._together and min(height, width) < side:
            scale = max(side / height, side / width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) / min(height, width) > _ASPECT:
            raise BadRequest(f"the video is {width}x{height}: sides beyond 1:{_ASPECT}", code="invalid_video")
        frames, depth = (count, round(count / self._temporal) * self._temporal) if self._together else (1, 1)
        across, down = round(width / side), round(height / side)
        area = depth * across * down * side**2
        if area > high:
            shrink = math.sqrt(frames * height * width / high)
            across, down = (max(1, math.floor(edge / shrink / side)) for edge in (width, height))
        elif area < low:
            stretch = math.sqrt(low / (frames * height * width))
            across, down = (math.ceil(edge * stretch / side) for edge in (width, height))
        return down * side, across * side

    def _capped(self, count: int, side: int, low: int, high: int) -> int:
        """The upper bound where the file says `cap_pixels_per_frame`."""
        tokens: int = self._told.get("max_video_tokens", 768 if self._together else 128000)
        floor = int(low * 1.05)
        if self._together:
            return max(min(tokens * side**2, high // count), floor) * count
        return max(min(high, int(tokens * side**2 * 0.9) * self._temporal // count), floor)

    def grid(self, count: int, size: tuple[int, int]) -> tuple[int, int, int]:
        return math.ceil(count / self._temporal), size[0] // self._patch, size[1] // self._patch

    def clip(self, film: Film, chosen: list[int]) -> Clip:
        step = self._temporal
        padded = chosen + chosen[-1:] * (-len(chosen) % step)
        times = [index / film.fps for index in padded]
        middles = tuple((times[n] + times[n + step - 1]) / 2 for n in range(0, len(times), step))
        return Clip(middles, step / (len(chosen) / film.frames * film.fps))

    def cut(self, frames: torch.Tensor) -> torch.Tensor:
        """Patches in the order of images: one merged token's patches stand together."""
        t, h, w = self.grid(len(frames), (frames.shape[2], frames.shape[3]))
        frames = torch.cat([frames, frames[-1:].expand(t * self._temporal - len(frames), -1, -1, -1)])
        patch, merge = self._patch, self._merge
        cells = self._normalised(frames).view(t, self._temporal, 3, h // merge, merge, patch, w // merge, merge, patch)
        ordered = cells.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        return ordered.reshape(t * h * w, 3 * self._temporal * patch**2)


class TileFilms(_Cutter):
    """Each frame as one square tile (InternVL)."""

    def __init__(self, said: Mapping[str, Any], config: Any) -> None:
        tower = config.vision_config
        size = {"height": tower.image_size[0], "width": tower.image_size[1]}
        super().__init__(said, {**_CLIP, "num_frames": 8, "size": size, "initial_shift": True})
        self._size = self._told["size"]["height"], self._told["size"]["width"]
        self._rows: int = tower.image_size[0] // tower.patch_size[0]
        self._columns: int = tower.image_size[1] // tower.patch_size[1]
        self._merge = merge_size(config)
        if self._size != (size["height"], size["width"]):
            raise SetupError(
                f"the video processor's tiles of {self._size} are not the tower's of {tuple(size.values())}"
            )

    def numbers(self) -> dict[str, Any]:
        return {"num_frames": self._told["num_frames"]}

    def choose(self, film: Film, sampling: Mapping[str, float]) -> list[int]:
        fps = sampling.get("fps")
        asked = film.seconds * fps if fps is not None else sampling.get("num_frames", self._told["num_frames"])
        count = max(1, min(int(asked), film.frames))
        shift = self._told["initial_shift"]
        first = film.frames / count / 2 if shift is True else shift
        return _spread(first, film.frames, count)

    def size(self, film: Film, count: int, bounds: Mapping[str, int]) -> tuple[int, int]:
        if bounds:
            raise BadRequest("this model's videos have no bounds of pixels", code="invalid_video")
        return self._size

    def grid(self, count: int, size: tuple[int, int]) -> tuple[int, int, int]:
        return count, self._rows, self._columns

    def clip(self, film: Film, chosen: list[int]) -> Clip:
        return Clip(tuple(index / film.fps for index in chosen), film.seconds / len(chosen))

    def cut(self, frames: torch.Tensor) -> torch.Tensor:
        return self._normalised(frames)


def _spread(first: float, total: int, count: int) -> list[int]:
    """As the processors do it, but for the one frame behind the last where `total / count` was rounded down."""
    return [int(n) for n in torch.arange(first, total, total / count).int()[:count]]


def _of_patches(side: int, **more: Any) -> dict[str, Any]:
    """The released processors' own bounds and patches, `side` pixels to a merged token."""
    return {"patch_size": side // 2, "size": {"shortest_edge": 128 * side**2, "longest_edge": 768 * side**2}, **more}


_HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_QWEN2: Callable[..., FilmCutter] = partial(GridFilms, together=False, defaults=_of_patches(28, **_CLIP))
_CUTTERS: Mapping[str, Callable[..., FilmCutter]] = {
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen3_vl": partial(GridFilms, together=True, defaults=_of_patches(32, **_HALVES)),
    "internvl": TileFilms,
}
