"""What one model makes of media, in numbers: vision tokens as its processor cuts them, and the work of encoding them.

Pure arithmetic. The rules of resizing are those of `transformers`' Qwen2VLImageProcessor (which Qwen2.5-VL and Qwen3-VL
use too), Qwen2VLVideoProcessor and Qwen3VLVideoProcessor; the work counts the multiplications of the vision tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, floor, sqrt
from typing import Any

from proxy.media.formats import Shape

UNKNOWN_TOKENS = 1024  # media that are elsewhere, or in a format that is not read here: about 900 x 900
AUDIO_TOKENS_PER_SECOND = 25  # Qwen2-Audio, Qwen2.5-Omni
_BYTES_PER_VIDEO_TOKEN = 512
_BYTES_PER_AUDIO_TOKEN = 640
_FEWEST, _MOST = 4, 16384  # tokens that are guessed from bytes alone
_CANVAS = (1280, 720)  # of a video that does not tell its own

_TOWERS: Mapping[str, Mapping[str, Any]] = {
    "qwen2_vl": {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "hidden_size": 3584, "patch_size": 14, "matrices": 2,
    },
    "qwen2_5_vl": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "patch_size": 14,
        "matrices": 3, "window_size": 112, "fullatt_block_indexes": (7, 15, 23, 31),
    },
    "qwen3_vl": {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096, "patch_size": 16,
        "matrices": 2, "deepstack_visual_indexes": (8, 16, 24),
    },
}  # fmt: skip
"""`vision_config` of the released models, 7B and 8B; `matrices`: of an MLP."""

_IMAGES: Mapping[str, tuple[int, int]] = {
    "qwen2_vl": (3136, 12845056),
    "qwen2_5_vl": (3136, 12845056),
    "qwen3_vl": (65536, 16777216),
}
_FRAMES: Mapping[str, tuple[int, int]] = {
    "qwen2_vl": (128 * 784, 768 * 784),
    "qwen2_5_vl": (128 * 784, 768 * 784),
    "qwen3_vl": (4096, 25165824),
}
"""The areas in pixels that released processors resize into: of images; of frames, each or together (`Vision.whole`)."""

_LEAST, _LARGEST = ("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")  # one thing, by either name
_ASPECT = 200  # processors refuse what is longer
_MOST_PIXELS = 1 << 28  # that a client's bounds are believed
_MOST_FRAMES = 1 << 16

_NAMES = (("qwen25vl", "qwen2_5_vl"), ("qwen25omni", "qwen2_5_vl"), ("qwen2vl", "qwen2_vl"), ("qvq", "qwen2_vl"),
          ("qwen3vl", "qwen3_vl"), ("qwen3omni", "qwen3_vl"), ("qwen35", "qwen3_vl"))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Vision:
    """One model's processor and tower. Areas are in pixels; a token is `merge` x `merge` patches."""

    family: str
    patch: int  # pixels each way
    merge: int  # patches each way
    min_pixels: int  # of an image, resized
    max_pixels: int
    knee: float  # tokens, attending to each other, of which attention costs as much as everything else
    embedding_bytes: int  # of one token
    temporal: int = 2  # frames of a patch
    video_min: int = 128 * 784
    video_max: int = 768 * 784
    whole: bool = False  # these two bound all frames of a video together, not each
    fps: float = 2.0  # at which videos are sampled
    min_frames: int = 4
    max_frames: int = 768

    def tokens(self, shape: Shape | None) -> int:
        """Embeddings that the media become. None: nothing is known of them."""
        slices, tokens = self._slices(shape)
        return slices * tokens

    def work(self, shape: Shape | None) -> int:
        """Encoding them, in tokens of a small image: tokens · (1 + tokens / knee), as attention grows by the square."""
        return self._work(*self._slices(shape))

    def price(self, shape: Shape | None) -> tuple[int, int]:
        """(tokens, work)."""
        slices, tokens = self._slices(shape)
        return slices * tokens, self._work(slices, tokens)

    def price_of(self, grid: tuple[int, int, int]) -> tuple[int, int]:
        """(tokens, work) of what an encoder cut into (t, h, w) patches."""
        t, h, w = grid
        tokens = max(1, h * w // self.merge**2)
        return t * tokens, self._work(t, tokens)

    def bounded(self, kwargs: object) -> Vision:
        """The same where a client's `mm_processor_kwargs` bound pixels or sample videos; what makes no sense is
        ignored."""
        if not isinstance(kwargs, dict):
            return self
        size = kwargs.get("size")
        named = {**(size if isinstance(size, dict) else {}), **kwargs}
        changes: dict[str, Any] = {}
        for names, images, videos in ((_LEAST, "min_pixels", "video_min"), (_LARGEST, "max_pixels", "video_max")):
            if (area := _first(named, *names)) is not None:
                changes |= {images: area, videos: area}
        fps, frames = named.get("fps"), named.get("num_frames")
        if isinstance(fps, int | float) and not isinstance(fps, bool) and 0 < fps <= _MOST_FRAMES:
            changes["fps"] = float(fps)
        if type(frames) is int and 0 < frames <= _MOST_FRAMES:
            changes |= {"min_frames": frames, "max_frames": frames}
        return replace(self, **changes) if changes else self

    def _work(self, slices: int, tokens: int) -> int:
        return max(1, round(slices * tokens * (1 + tokens / self.knee)))

    def _slices(self, shape: Shape | None) -> tuple[int, int]:
        """(number of slices, tokens of each): those of one slice attend to each other, and to no others."""
        if shape is None:
            return 1, UNKNOWN_TOKENS
        if shape.modality == "image":
            return 1, self._image(shape.width, shape.height) if shape.width and shape.height else UNKNOWN_TOKENS
        if shape.modality == "video":
            return self._video(shape)
        if shape.seconds is not None:
            return max(1, ceil(shape.seconds * AUDIO_TOKENS_PER_SECOND)), 1
        return _guessed(shape.nbytes, _BYTES_PER_AUDIO_TOKEN), 1

    def _image(self, width: int, height: int) -> int:
        across, down = resized(width, height, self.patch * self.merge, self.min_pixels, self.max_pixels)
        return across * down

    def _video(self, shape: Shape) -> tuple[int, int]:
        if shape.seconds is None:
            return 1, _guessed(shape.nbytes, _BYTES_PER_VIDEO_TOKEN)
        sampled = max(int(shape.seconds * self.fps), self.min_frames)
        frames = min(sampled, self.max_frames, shape.frames or sampled)
        width, height = (shape.width, shape.height) if shape.width and shape.height else _CANVAS
        side = self.patch * self.merge
        if self.whole:
            across, down = resized(width, height, side, self.video_min, self.video_max, frames, self.temporal)
        else:
            across, down = resized(width, height, side, self.video_min, self.video_max)
        return ceil(frames / self.temporal), across * down


def resized(
    width: int, height: int, side: int, low: int, high: int, frames: int = 1, temporal: int = 1
) -> tuple[int, int]:
    """(columns, rows) of tokens of `side` pixels, once all frames together have between `low` and `high` pixels.

    Within a rounding, and with the shape that it had.
    """
    width, height = max(1, min(width, _ASPECT * height)), max(1, min(height, _ASPECT * width))
    if frames > 1 and min(width, height) < side:
        scale = max(side / height, side / width)
        width, height = int(width * scale), int(height * scale)
    across, down = round(width / side), round(height / side)
    area = across * down * side**2 * (round(frames / temporal) * temporal if frames > 1 else 1)
    if area > high:
        shrink = sqrt(frames * height * width / high)
        across, down = floor(width / shrink / side), floor(height / shrink / side)
    elif area < low:
        stretch = sqrt(low / (frames * height * width))
        across, down = ceil(width * stretch / side), ceil(height * stretch / side)
    return max(1, across), max(1, down)


def _guessed(nbytes: int | None, per_token: int) -> int:
    return UNKNOWN_TOKENS if nbytes is None else max(_FEWEST, min(_MOST, nbytes // per_token))


# ---- of whom


def family_of(name: str) -> str | None:
    """The family that the name of a model, or the `model_type` of its configuration, speaks of; None if of none."""
    plain = "".join(filter(str.isalnum, name.lower()))
    return next((family for part, family in _NAMES if part in plain), None)


def vision(
    family: str,
    tower: Mapping[str, Any] | None = None,
    image: Mapping[str, Any] | None = None,
    video: Mapping[str, Any] | None = None,
    itemsize: int = 2,
) -> Vision:
    """What the released models of a family are, but for what is told: a configuration's `vision_config`, and the files
    of its image and its video processor. `itemsize`: bytes of a number of an embedding.

    Raises LookupError for an unknown family, TypeError or ValueError for numbers that are none.
    """
    at = {**_TOWERS[family], **(tower or {})}
    image, video = image or {}, video or {}
    patch, merge = int(image.get("patch_size") or at["patch_size"]), int(image.get("merge_size") or 2)
    levels = 1 + len(at.get("deepstack_visual_indexes") or ())
    width = int(at.get("out_hidden_size") or at["hidden_size"])
    temporal = int(image.get("temporal_patch_size") or 2)
    if min(patch, merge, temporal, width, itemsize) <= 0:
        raise ValueError("sizes are above 0")
    low, high = _area(image, _IMAGES[family])
    video_low, video_high = _area(video, _FRAMES[family])
    return Vision(
        family=family,
        patch=patch,
        merge=merge,
        min_pixels=low,
        max_pixels=high,
        knee=_knee(at, merge, width, levels),
        embedding_bytes=width * levels * itemsize,
        temporal=temporal,
        video_min=video_low,
        video_max=video_high,
        whole=family == "qwen3_vl",
        fps=float(video.get("fps") or 2.0),
        min_frames=int(video.get("min_frames") or 4),
        max_frames=int(video.get("max_frames") or 768),
    )


def told(said: object) -> Vision | None:
    """Out of what one of our encoders says of itself (`vision` in its `/info`); None if it makes no sense."""
    if not isinstance(said, dict):
        return None
    family = family_of(str(said.get("model_type")))
    if family is None:
        return None
    try:
        image, video = said["image_processor"], said.get("video_processor")
        return vision(family, said["vision_config"], image, video, int(said["itemsize"]))
    except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError):
        return None


def _area(processor: Mapping[str, Any], released: tuple[int, int]) -> tuple[int, int]:
    named = {**(processor.get("size") or {}), **processor}
    low, high = (_first(named, *names) for names in (_LEAST, _LARGEST))
    return low or released[0], high or released[1]


def _first(named: Mapping[str, Any], *names: str) -> int | None:
    """The first number of pixels by one of these names."""
    found = (named.get(name) for name in names)
    return next((n for n in found if type(n) is int and 0 < n <= _MOST_PIXELS), None)


def _knee(tower: Mapping[str, Any], merge: int, out: int, levels: int) -> float:
    """Multiplications of a patch in layers, windows and mergers, over those that it adds to each other one's."""
    depth, width = int(tower["depth"]), int(tower.get("embed_dim") or tower["hidden_size"])
    inner = int(width * tower["mlp_ratio"] if "mlp_ratio" in tower else tower["intermediate_size"])
    full = len(tower["fullatt_block_indexes"]) if "fullatt_block_indexes" in tower else depth
    window = (tower["window_size"] / tower["patch_size"]) ** 2 if full < depth else 0
    merged = width * merge**2
    linear = depth * (4 * width**2 + tower["matrices"] * width * inner) * 2
    linear += (depth - full) * 4 * window * width + levels * (merged**2 + merged * out) * 2 / merge**2
    return float(linear / (max(1, full) * 4 * width) / merge**2)


FAMILIES: Mapping[str, Vision] = {family: vision(family) for family in _TOWERS}
"""As their released 7B and 8B models are, with embeddings of two bytes a number."""

DEFAULT = FAMILIES["qwen2_5_vl"]
"""Where nobody tells: it cuts media as most do."""
