"""Requests with videos that every topology with an encoder must answer exactly as one `transformers` model does."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.support import video_reference
from tests.support.cluster import Client
from tests.support.films import video_file, video_part
from tests.support.pictures import image_file, image_part
from tests.system.cases import MAX_TOKENS

ENCODING = ("E+PD", "E+P+D push", "E+P+D pull")
SHORT, WEBM = video_file(), video_file(24, (96, 128), 8, seed=1, container="webm")
LONG = video_file(60, (64, 64), 2, seed=2)  # its time goes on behind the text that follows it
PICTURE = image_file(96, 64, seed=3)


@dataclass(frozen=True)
class VideoCase:
    """A user message as parts: a string is text, others are (modality, file)."""

    name: str
    parts: tuple[str | tuple[str, bytes], ...]

    @property
    def media(self) -> list[tuple[str, bytes]]:
        return [part for part in self.parts if not isinstance(part, str)]

    @property
    def content(self) -> list[dict[str, Any]]:
        makers = {"image": image_part, "video": video_part}
        return [
            {"type": "text", "text": part} if isinstance(part, str) else makers[part[0]](part[1]) for part in self.parts
        ]

    def expected(self, family: str) -> str:
        shown = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p[0]} for p in self.parts]
        messages = [{"role": "user", "content": shown}]
        return video_reference.answer(family, messages, self.media, MAX_TOKENS)


VIDEOS = (
    VideoCase("one video", (("video", SHORT), "What happens?")),
    VideoCase("with an image", ("First ", ("image", PICTURE), "then ", ("video", WEBM), "?")),
    VideoCase("two videos", (("video", SHORT), ("video", LONG), "ok")),
)


async def check(family: str, proxies: Mapping[str, Client], case: VideoCase) -> None:
    """Through every topology with an encoder at the same time."""
    asked = (proxies[name].chat(case.content, max_tokens=MAX_TOKENS) for name in ENCODING)
    answers = await asyncio.gather(*asked)
    expected = case.expected(family)
    for name, answer in zip(ENCODING, answers, strict=True):
        assert (answer.status, answer.error) == (200, None), name
        assert answer.text == expected, name
