"""What a request's items and text will cost, by all that was learnt of models and media. Pure, and for any thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from proxy.core import Body, model_of
from proxy.media import formats
from proxy.media.formats import Shape
from proxy.media.sizes import Grid, Sizes
from proxy.media.splice import Media
from proxy.media.text import Text
from proxy.media.vision import DEFAULT, Vision

Price: TypeAlias = tuple[int, int]
"""Of an item: predicted tokens, and work in tokens of a small image."""

Size: TypeAlias = Shape | Grid
"""Of an item, as its own bytes tell or as an encoder cut it."""


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

    def size(self, modality: str, found: Media | None, identity: str) -> Size | None:
        """Of an item. `found`: None where its bytes are elsewhere; then an encoder may have told of `identity`."""
        if found is not None and modality == "image":
            return formats.measure(modality, found.head, found.nbytes, found.at)
        known = self.sizes.find(identity)
        if known is not None or found is None:
            return known
        return formats.measure(modality, found.head, found.nbytes, found.at)

    def price(self, vision: Vision, modality: str, found: Media | None, identity: str) -> Price:
        """Of an item, told as for `size`."""
        return price_of(vision, self.size(modality, found, identity))


def price_of(vision: Vision, size: Size | None) -> Price:
    """Of an item of that size; None: nothing is known of it."""
    return vision.price_of(size) if isinstance(size, tuple) else vision.price(size)
