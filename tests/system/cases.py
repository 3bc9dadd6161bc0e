"""The requests that every topology must answer exactly as one `transformers` model does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.support.pictures import image_file, image_part
from tests.support.reference import reference

MAX_TOKENS = 12
WIDE, TALL = image_file(320, 160, seed=3), image_file(96, 192, seed=4, format="JPEG")
LONG = " ".join(f"Line {n}: the quick brown fox jumps over the lazy dog." for n in range(12))


@dataclass(frozen=True)
class Case:
    """A user message as parts: a string is text, bytes are an image file."""

    name: str
    parts: tuple[str | bytes, ...]

    @property
    def images(self) -> list[bytes]:
        return [part for part in self.parts if isinstance(part, bytes)]

    @property
    def content(self) -> str | list[dict[str, Any]]:
        """The OpenAI content: a plain string when there is no image."""
        if not self.images:
            return "".join(str(part) for part in self.parts)
        return [image_part(p) if isinstance(p, bytes) else {"type": "text", "text": p} for p in self.parts]

    def reference_messages(self) -> list[dict[str, Any]]:
        parts = [{"type": "image"} if isinstance(p, bytes) else {"type": "text", "text": p} for p in self.parts]
        return [{"role": "user", "content": parts}]

    def expected(self, family: str, max_tokens: int = MAX_TOKENS) -> str:
        return expected(self, family, max_tokens)


@cache
def expected(case: Case, family: str, max_tokens: int) -> str:
    return reference(family).answer(case.reference_messages(), case.images, max_tokens)


CASES = (
    Case("text", ("Say something about the sea.",)),
    Case("one image", (WIDE, "What is this?")),
    Case("two images", ("First ", WIDE, " and then ", TALL, ": compare them.")),
    Case("same image twice", (TALL, TALL, "Is there a difference?")),
    Case("long prompt", (LONG, WIDE, "Where does it end?")),
)
