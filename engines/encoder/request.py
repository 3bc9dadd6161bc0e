"""Reads an encode request into items and writes its answer. No I/O: it is the wire contract of this engine, and
nothing else.

In:   an OpenAI chat body whose message parts are media; text is ignored, generation parameters too.
Out:  an OpenAI chat completion without text, whose `ec_transfer_params` says where each item's embedding can be had:
      {mm_hash: {modality, item_indices, metadata: {image_grid_thw}, num_tokens, dtype, shape, where, cached}}
      `cached`: it was there before it was asked for. Metadata of a video: {video_grid_thw, second_per_grid_ts,
      timestamps}, the latter one for each of its steps in time, in seconds.

Asked with `"announce": true` it may answer a stream of events: the same body once it is known where each embedding will
be, whose readers wait for it there; then `[DONE]` when all are there, or an error. What is known at once is no stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from blake3 import blake3

from engines.encoder.frames import Clip
from engines.errors import BadRequest

MM_HASH = re.compile(r"[0-9a-f]{64}")
TAKEN = {"image_url": "image", "video_url": "video"}
OTHER_MEDIA = frozenset({"video_url", "audio_url", "input_audio", "video", "audio", "file"})
SAMPLING = ("fps", "num_frames")
MOST_FRAMES = 1 << 20
EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One item of one request.

    size: the bounds asked for, {"shortest_edge", "longest_edge"} in pixels²; empty: the checkpoint's.
    sampling: {"fps"} or {"num_frames"} that a video is to be seen by; empty: the checkpoint's.
    """

    index: int
    param: str
    url: str
    uuid: str | None = None
    size: Mapping[str, int] = field(default_factory=dict)
    modality: str = "image"
    sampling: Mapping[str, float] = field(default_factory=dict)

    def key(self, digest: str) -> str:
        """The mm_hash of the embedding: the content's own hash, mixed with whatever changes its pixels. A file may be
        both an image and a video."""
        changes: dict[str, Any] = {**self.size}
        if self.modality == "video":
            changes |= {"modality": "video", **self.sampling}
        if not changes:
            return digest
        return blake3(digest.encode() + orjson.dumps(changes, option=orjson.OPT_SORT_KEYS)).hexdigest()


@dataclass(frozen=True, slots=True)
class Embedding:
    """What an answer says about one embedding. `where` is opaque: the transfer's own words. `clip`: of a video."""

    grid: tuple[int, int, int]
    tokens: int
    dtype: str
    shape: tuple[int, int]
    where: Mapping[str, Any]
    clip: Clip | None = None

    @property
    def modality(self) -> str:
        return "image" if self.clip is None else "video"

    @property
    def metadata(self) -> dict[str, Any]:
        """What whoever lays out the prompt needs of it."""
        if self.clip is None:
            return {"image_grid_thw": list(self.grid)}
        return {
            "video_grid_thw": list(self.grid),
            "second_per_grid_ts": self.clip.spacing,
            "timestamps": list(self.clip.timestamps),
        }


def parse(body: Mapping[str, Any], max_items: int) -> list[MediaItem]:
    """The items of a request, in order. Raises BadRequest that names the field."""
    if body.get("stream"):
        raise BadRequest("an encoder does not stream: leave `stream` out", param="stream")
    if body.get("media_io_kwargs"):
        raise BadRequest("this encoder knows no media_io_kwargs", param="media_io_kwargs")
    size, sampling = _processing(body.get("mm_processor_kwargs"))
    items: list[MediaItem] = []
    for param, part in _parts(body.get("messages")):
        if (modality := _modality(param, part)) is not None:
            url = _url(param, part, modality)
            own = sampling if modality == "video" else {}
            items.append(MediaItem(len(items), param, url, _uuid(param, part), size, modality, own))
    if not items:
        told = "nothing to encode: the messages hold no image_url and no video_url part"
        raise BadRequest(told, param="messages", code="no_media")
    if len(items) > max_items:
        raise BadRequest(f"{len(items)} items in one request, at most {max_items} (--max-items)", param="messages")
    return items


def _parts(messages: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not isinstance(messages, list) or not messages:
        raise BadRequest("`messages` must be a list of messages", param="messages")
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list):
            raise BadRequest("`content` must be a string or a list of parts", param=f"messages[{number}].content")
        for index, part in enumerate(content):
            param = f"messages[{number}].content[{index}]"
            if not isinstance(part, dict):
                raise BadRequest(f"{param} must be an object", param=param)
            yield param, part


def _modality(param: str, part: Mapping[str, Any]) -> str | None:
    """Of a media part; None: it is text."""
    kind = part.get("type")
    if kind == "text":
        return None
    taken = TAKEN.get(kind) if isinstance(kind, str) else None
    if taken is None and isinstance(kind, str) and kind in OTHER_MEDIA:
        told = f"{param}: this encoder takes image_url and video_url, not {kind}: none of its models has audio"
        raise BadRequest(told, param=param, code="unsupported_modality")
    if taken is None:
        raise BadRequest(f"{param}: an encoder takes image_url and video_url parts, not {kind!r}", param=param)
    return taken


def _url(param: str, part: Mapping[str, Any], modality: str) -> str:
    kind = f"{modality}_url"
    value = part.get(kind)
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str) or not url:
        raise BadRequest(f"{param}: {kind} needs a `url`", param=param)
    return url


def _uuid(param: str, part: Mapping[str, Any]) -> str | None:
    uuid = part.get("uuid")
    if uuid is None:
        return None
    if not isinstance(uuid, str) or not MM_HASH.fullmatch(uuid):
        # Transports use it as a name, of a file for one: anything but a plain hash is refused.
        raise BadRequest(f"{param}: uuid must be 64 lowercase hex digits, a hash of the content", param=param)
    return uuid


def _processing(kwargs: object) -> tuple[Mapping[str, int], Mapping[str, float]]:
    """(bounds of pixels, sampling of videos) of `mm_processor_kwargs`."""
    if kwargs is None:
        return {}, {}
    if not isinstance(kwargs, dict):
        raise BadRequest("`mm_processor_kwargs` must be an object", param="mm_processor_kwargs")
    return _size(kwargs), _sampling({name: kwargs[name] for name in SAMPLING if name in kwargs})


def _sampling(asked: Mapping[str, Any]) -> Mapping[str, float]:
    for name, value in asked.items():
        kinds = (int, float) if name == "fps" else (int,)
        if type(value) not in kinds or not 0 < value <= MOST_FRAMES:
            param = f"mm_processor_kwargs.{name}"
            raise BadRequest(f"{param} must be a number of frames above 0, {MOST_FRAMES} at most", param=param)
    if len(asked) > 1:
        raise BadRequest("a video is seen by fps or by num_frames, not by both", param="mm_processor_kwargs")
    return asked


def _size(kwargs: Mapping[str, Any]) -> Mapping[str, int]:
    flat = {key: value for key, value in kwargs.items() if key != "size" and key not in SAMPLING}
    size = kwargs.get("size") or {}
    if not isinstance(size, dict):
        raise BadRequest("`size` must be an object", param="mm_processor_kwargs.size")
    named = {f"mm_processor_kwargs.{key}": (EDGES.get(key), value) for key, value in flat.items()}
    named |= {
        f"mm_processor_kwargs.size.{key}": (key if key in EDGES.values() else None, value)
        for key, value in size.items()
    }
    bounds = {}
    for param, (edge, value) in named.items():
        if edge is None:
            known = "min_pixels, max_pixels, size {shortest_edge, longest_edge}, fps and num_frames"
            raise BadRequest(f"{param} is not supported: this encoder knows {known}", param=param)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise BadRequest(f"{param} must be a number of pixels above 0", param=param)
        bounds[edge] = value
    if len(bounds) == 2 and bounds["shortest_edge"] > bounds["longest_edge"]:
        raise BadRequest("the least number of pixels is above the largest", param="mm_processor_kwargs")
    return bounds


def answer(
    request_id: str,
    model: str,
    created: int,
    items: Sequence[MediaItem],
    embeddings: Sequence[tuple[str, Embedding, bool]],
) -> dict[str, Any]:
    """The response body; `embeddings` are (mm_hash, embedding, cached) of each item, in order."""
    entries: dict[str, dict[str, Any]] = {}
    for item, (mm_hash, found, cached) in zip(items, embeddings, strict=True):
        entry = entries.setdefault(
            mm_hash,
            {
                "modality": found.modality,
                "item_indices": [],
                "metadata": found.metadata,
                "num_tokens": found.tokens,
                "dtype": found.dtype,
                "shape": list(found.shape),
                "where": found.where,
                "cached": cached,
            },
        )
        entry["item_indices"].append(item.index)
    tokens = sum(found.tokens for _, found, _ in embeddings)
    choice = {"index": 0, "message": {"role": "assistant", "content": ""}, "finish_reason": "stop"}
    return {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [choice],
        "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
        "kv_transfer_params": None,
        "ec_transfer_params": entries,
    }
