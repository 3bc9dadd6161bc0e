"""What clients send, as a workload describes it: parts with identities and sizes, but no bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Media:
    """One image (or video: `frames` of them). Equal identities are the same bytes."""

    identity: str
    width: int
    height: int
    modality: str = "image"
    frames: int = 1


@dataclass(frozen=True, slots=True)
class Text:
    """A run of text. Equal identities are the same text; one without is like no other."""

    tokens: int
    identity: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """`parts` in reading order."""

    parts: tuple[Text | Media, ...]
    output_tokens: int = 1

    @property
    def media(self) -> tuple[Media, ...]:
        return tuple(part for part in self.parts if isinstance(part, Media))

    @property
    def text_tokens(self) -> int:
        return sum(part.tokens for part in self.parts if isinstance(part, Text))
