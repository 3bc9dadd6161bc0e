"""What is asked: a stream of chat requests, text alone or with images. The same seed asks the same again."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import orjson

from bench.pictures import image_file, image_part

_WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "it",
    "is",
    "was",
    "for",
    "on",
    "with",
    "as",
    "at",
    "by",
    "from",
    "we",
]
_DRAWN = 16  # pictures of each size; the others are these with another end, as drawing takes a while


@dataclass(frozen=True, slots=True)
class Mixture:
    """images: per request that has any, which is a `share` of all. sizes: in pixels, in turn. distinct: how many
    different images there are; 0: no image is asked about twice."""

    model: str
    words: int = 100
    tokens: int = 64
    images: int = 0
    share: float = 1.0
    sizes: tuple[tuple[int, int], ...] = ((640, 480),)
    distinct: int = 0
    stream: bool = True
    exact: bool = True  # ask for no fewer tokens than `tokens`
    extra: Mapping[str, Any] | None = None  # fields for every request


@dataclass(frozen=True, slots=True)
class Question:
    kind: str  # text | image
    body: bytes


def questions(mixture: Mixture, seed: int) -> Iterator[Question]:
    """For ever."""
    dice = random.Random(seed)
    drawn = 0
    while True:
        parts: list[Mapping[str, Any]] = []
        if mixture.images and dice.random() < mixture.share:
            for _ in range(mixture.images):
                number = dice.randrange(mixture.distinct) if mixture.distinct else drawn
                parts.append(_image(mixture.sizes[number % len(mixture.sizes)], seed, number))
                drawn += 1
        kind = "image" if parts else "text"
        parts.append({"type": "text", "text": " ".join(dice.choices(_WORDS, k=mixture.words))})
        yield Question(kind, orjson.dumps(_body(mixture, parts if kind == "image" else parts[0]["text"])))


def _body(mixture: Mixture, content: object) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": mixture.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": mixture.tokens,
        "temperature": 0,
        "stream": mixture.stream,
    }
    if mixture.stream:
        body["stream_options"] = {"include_usage": True}
    if mixture.exact:
        body |= {"ignore_eos": True, "min_tokens": mixture.tokens}
    return {**body, **(mixture.extra or {})}


def _image(size: tuple[int, int], seed: int, number: int) -> Mapping[str, Any]:
    """What follows a JPEG's end is ignored by all who decode it, and makes other bytes of it for all who hash it."""
    return image_part(_drawn(size, seed * _DRAWN + number % _DRAWN) + number.to_bytes(8, "big"), "image/jpeg")


@cache
def _drawn(size: tuple[int, int], seed: int) -> bytes:
    return image_file(*size, seed, "JPEG")
