"""What a request's items and text will cost, by all that was learnt of models and media. Pure, and for any thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from proxy import media
from proxy.core import Body, model_of
from proxy.media import Shape
from proxy.sizes import Sizes
from proxy.splice import Media
from proxy.text import Text
from proxy.vision import DEFAULT, Vision

Price: TypeAlias = tuple[int, int]
"""Of an item: predicted tokens, and work in tokens of a small image."""


class Visions(Protocol):
    def of(self, model: str) -> Vision:
        """What encodes the media of requests for `model`."""


class OneVision:
    """The same for every model."""

    def __init__(self, vision: Vision = DEFAULT) -> None:
        self._vision = vision

    def of(self, model: str) -> Vision:
        return self._vision


@dataclass(frozen=True, slots=True)
class Costs:
    """`text` and `sizes` are taught by whoever reads answers: see `Text.learn` and `Sizes.learn`."""

    visions: Visions = field(default_factory=OneVision)
    sizes: Sizes = field(default_factory=Sizes)
    text: Text = field(default_factory=Text)

    def vision(self, body: Body) -> Vision:
        """What encodes the media of a request, in the bounds that it sets."""
        return self.visions.of(model_of(body)).bounded(body.get("mm_processor_kwargs"))

    def price(self, vision: Vision, modality: str, found: Media | None, identity: str) -> Price:
        """Of an item. `found`: None where its bytes are elsewhere; then an encoder may have told of `identity`."""
        if found is not None and modality == "image":
            return vision.price(media.measure(modality, found.head, found.nbytes, found.at))
        known = self.sizes.find(identity)
        if known is not None:
            return vision.price(known) if isinstance(known, Shape) else vision.price_of(known)
        if found is None:
            return vision.price(None)
        return vision.price(media.measure(modality, found.head, found.nbytes, found.at))
