"""What arrives, and when: requests with their images, made up from distributions. Knows no engine and no clock.

Everything is drawn from the generator that is passed in: the same seed makes the same requests. Arrivals say when a
request comes and how long it is, a gallery says which images it shows; a trace may stand in for the arrivals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count, islice

import numpy as np
from numpy.random import Generator

from bench.simulator.requests import Media, Request, Text

Size = tuple[int, int]
"""Width and height in pixels."""

VGA, HD, FULL_HD, UHD = (640, 480), (1280, 720), (1920, 1080), (3840, 2160)
MIXED: Mapping[Size, float] = {VGA: 0.60, HD: 0.25, FULL_HD: 0.10, UHD: 0.05}
"""Sizes by their share of the images."""

Arrival = tuple[float, Request]
"""When, in seconds from the start, and what."""

Span = tuple[int, int]
"""The least and the most, both included; all between are equally likely."""

_CHUNK = 4096  # numbers drawn at once


# ---- when


def poisson(rate: float, dice: Generator) -> Iterator[float]:
    """Arrivals in seconds, `rate` per second, independent of each other."""
    return gamma(rate, 1.0, dice)


def gamma(rate: float, variation: float, dice: Generator) -> Iterator[float]:
    """Arrivals whose gaps are gamma distributed; `variation` is their standard deviation by their mean, 1 for Poisson.

    Above 1 they come in bursts, below more evenly. Raises ValueError unless both are greater than 0.
    """
    if rate <= 0 or variation <= 0:
        raise ValueError(f"no arrivals have a rate of {rate} and a variation of {variation}")
    return _gamma(rate, variation**-2, dice)


def _gamma(rate: float, shape: float, dice: Generator) -> Iterator[float]:
    now = 0.0
    while True:
        times = now + np.cumsum(dice.gamma(shape, 1 / (rate * shape), _CHUNK))
        yield from times.tolist()
        now = float(times[-1])


# ---- which images


class Gallery:
    """Images to show: of sizes by their share, each a new one, or again and again by Zipf's law.

    A catalogue's k-th image is shown in proportion to k ** -exponent, and keeps its size; which sizes the most popular
    ones have is drawn, too, each size having its share among images of like popularity.
    """

    def __init__(
        self, dice: Generator, mix: Mapping[Size, float] = MIXED, catalogue: int = 0, exponent: float = 0.9
    ) -> None:
        """`catalogue`: how many different images there are; 0 for as many as are shown.

        Raises ValueError if `mix` has no share above 0.
        """
        if not mix or sum(mix.values()) <= 0:
            raise ValueError("a gallery needs a size with a share")
        self._dice = dice
        self._sizes = list(mix)
        self._edges = np.cumsum(list(mix.values())) / sum(mix.values())
        self._catalogue = [self._image(f"c{k}", share) for k, share in enumerate(_even(catalogue, dice))]
        weights = np.arange(1, catalogue + 1, dtype=float) ** -exponent
        self._popularity = np.cumsum(weights) / weights.sum()
        self._images = self._again() if catalogue else self._ever_new()

    def show(self, number: int) -> tuple[Media, ...]:
        """The images of the next request."""
        return tuple(islice(self._images, number))

    def _image(self, key: str, share: float) -> Media:
        return Media(key, *self._sizes[min(int(np.searchsorted(self._edges, share, "right")), len(self._sizes) - 1)])

    def _again(self) -> Iterator[Media]:
        last = len(self._catalogue) - 1
        while True:
            for k in np.searchsorted(self._popularity, self._dice.random(_CHUNK), "right").tolist():
                yield self._catalogue[min(k, last)]

    def _ever_new(self) -> Iterator[Media]:
        numbers, last = count(), len(self._sizes) - 1
        while True:
            for size in np.searchsorted(self._edges, self._dice.random(_CHUNK), "right").tolist():
                yield Media(f"n{next(numbers)}", *self._sizes[min(size, last)])


def _even(number: int, dice: Generator) -> list[float]:
    """Numbers in [0, 1), spread evenly at any prefix: the golden ratio's multiples from a drawn start.

    Independent draws would let chance decide how large the ten images are that make a fifth of the traffic.
    """
    golden, start = (5**0.5 - 1) / 2, float(dice.random())
    return [(start + golden * k) % 1.0 for k in range(number)]


# ---- whole requests


@dataclass(frozen=True, slots=True)
class Shape:
    """How long requests are and how many images they show."""

    images: Span = (1, 8)
    text_tokens: Span = (64, 512)
    output_tokens: Span = (32, 256)


def requests(
    arrivals: Iterable[float], gallery: Gallery, dice: Generator, shape: Shape | None = None
) -> Iterator[Arrival]:
    """One request for each of `arrivals`, images before the text; endless if those are."""
    lengths = shape or Shape()
    spans = (lengths.images, lengths.text_tokens, lengths.output_tokens)
    drawn = zip(*(_integers(span, dice) for span in spans), strict=True)
    for at, (images, text, output) in zip(arrivals, drawn, strict=False):
        yield at, Request((*gallery.show(images), Text(text)), output)


def illustrated(
    source: Iterable[Arrival], gallery: Gallery, dice: Generator, share: float = 1.0, images: Span = (1, 1)
) -> Iterator[Arrival]:
    """`source`, such as a trace of text, a `share` of it with images of `gallery` after the text."""
    numbers = _integers(images, dice)
    for at, request in source:
        if dice.random() < share:
            request = replace(request, parts=(*request.parts, *gallery.show(next(numbers))))
        yield at, request


def _integers(span: Span, dice: Generator) -> Iterator[int]:
    while True:
        yield from dice.integers(*span, _CHUNK, endpoint=True).tolist()
