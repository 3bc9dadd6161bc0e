"""A simulated request in the words of others: as the live proxy parses it, and as the prompt that engines compute."""

from __future__ import annotations

from itertools import count

from bench.simulator.engines import Part
from bench.simulator.models import Vision
from bench.simulator.requests import Media, Request, Text
from proxy.core import Api, Item, Job
from proxy.media import vision
from proxy.media.formats import Shape

_IMAGE = {"type": "image_url"}
_BYTES_PER_TOKEN = 4


class Parser:
    """Requests as the live proxy parses and prices them, by what it knows of its encoders: `sees`."""

    def __init__(self, sees: vision.Vision) -> None:
        self._sees = sees
        self._count = count()
        self._prices: dict[tuple[str, int, int, int], tuple[int, int]] = {}  # by shape: tokens and work

    def job(self, request: Request) -> Job:
        """With a body of the same parts in the same order, whose texts are equal where their identities are."""
        content: list[dict[str, str]] = []
        items: list[Item] = []
        for number, part in enumerate(request.parts):
            if isinstance(part, Media):
                content.append(_IMAGE)
                items.append(self._item(len(items), number, part))
            else:
                words = part.identity or f"text {next(self._count)}"
                content.append({"type": "text", "text": words.ljust(_BYTES_PER_TOKEN * part.tokens)})
        body = {"messages": [{"role": "user", "content": content}]}
        return Job("", Api.CHAT, body, tuple(items), request.text_tokens, request.output_tokens, stream=True)

    def _item(self, index: int, number: int, one: Media) -> Item:
        key = one.modality, one.width, one.height, one.frames
        price = self._prices.get(key)
        if price is None:
            seconds = one.frames / self._sees.fps
            shape = Shape(one.modality, None, one.width, one.height, one.frames, seconds)
            price = self._prices[key] = self._sees.price(shape)
        tokens, work = price
        nbytes = tokens * self._sees.embedding_bytes
        return Item(index, 0, number, one.modality, {}, one.identity, one.identity, tokens, work, nbytes)


def prompt(request: Request, sight: Vision | None) -> tuple[Part, ...]:
    """The prompt in tokens. The key of a part tells all that is before it; after text like no other there is none.

    Raises ValueError if there are media and no `sight` tells their tokens.
    """
    key: int | None = 0
    end = 0
    parts = []
    for part in request.parts:
        key = hash((key, part.identity)) if key is not None and part.identity else None
        if isinstance(part, Text):
            end += part.tokens
            parts.append(Part(key, end))
        else:
            if sight is None:
                raise ValueError("nobody here can see")
            end += sight.cost(part).tokens
            parts.append(Part(key, end, part))
    return tuple(parts)
