"""Paths by predicted first tokens: the sooner one, and no wavering."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import openai
from proxy.core import Api, Path
from proxy.openai import Identity
from proxy.routing.decider import HEAVY, MARGIN, Decider, Forecast, kind
from tests.fakes.media import chat, image, part

APART, INLINE = Path.E_P_D, Path.EPD


def between(apart: float, inline: float) -> list[Forecast]:
    return [Forecast(APART, apart), Forecast(INLINE, inline)]


@pytest.mark.parametrize(
    ("apart", "inline", "path", "words"),
    [
        (0.412, 0.655, APART, "412 ms apart, 655 ms inline"),
        (0.655, 0.412, INLINE, "412 ms inline, 655 ms apart"),
        (0.5, 0.499, APART, "500 ms apart, 499 ms inline"),
        (0.0, 0.0, APART, "0 ms apart, 0 ms inline"),
    ],
)
def test_the_sooner_path_is_taken_and_both_times_are_told(apart: float, inline: float, path: Path, words: str) -> None:
    assert Decider().decide("text", between(apart, inline)) == (path, words)


def test_among_many_the_best_is_compared_with_the_next() -> None:
    several = [Forecast(Path.E_P_D, 0.5), Forecast(Path.E_PD, 0.3), Forecast(Path.EPD, 0.4)]
    assert Decider().decide("text", several) == (Path.E_PD, "300 ms encoded apart, 400 ms inline")


def test_each_kind_of_request_has_a_preference_of_its_own() -> None:
    decider = Decider()
    assert decider.decide("light media", between(0.5, 0.3))[0] is INLINE
    assert decider.decide("heavy media", between(0.5, 0.5))[0] is APART
    assert decider.decide("light media", between(0.5, 0.5))[0] is INLINE


def test_a_preference_that_cannot_be_had_is_given_up() -> None:
    decider = Decider()
    assert decider.decide("text", between(0.5, 0.3))[0] is INLINE
    without = [Forecast(APART, 0.5), Forecast(Path.E_PD, 0.5)]
    assert decider.decide("text", without)[0] is APART
    assert repr(decider) == "<Decider {'text': 'E-P-D'}>"


@given(st.lists(st.floats(1 - MARGIN / 2.1, 1 + MARGIN / 2.1), min_size=2))
def test_what_moves_by_less_than_the_margin_changes_nothing(noise: list[float]) -> None:
    decider = Decider()
    assert len({decider.decide("text", between(a, b))[0] for a, b in pairwise(noise)}) == 1


TIMES = st.floats(0.001, 10.0)


@given(st.lists(st.tuples(TIMES, TIMES)))
def test_it_is_never_further_from_the_best_than_the_margin_and_never_changes_for_less(
    times: list[tuple[float, float]],
) -> None:
    decider, again, before = Decider(), Decider(), APART
    for apart, inline in times:
        path, words = decider.decide("text", between(apart, inline))
        taken, other = (apart, inline) if path is APART else (inline, apart)
        assert taken * (1 - MARGIN) <= other
        if path is not before:
            assert taken < other * (1 - MARGIN)
        before = path
        assert again.decide("text", between(apart, inline)) == (path, words)


def test_kinds_are_text_and_media_by_what_they_cost_to_encode() -> None:
    def asked(*works: int) -> str:
        job = openai.parse(orjson.dumps(chat(*(part(image()) for _ in works))), Api.CHAT, "id", Identity())
        items = tuple(replace(item, work=work) for item, work in zip(job.items, works, strict=True))
        return kind(replace(job, items=items))

    assert (asked(), asked(HEAVY - 1), asked(HEAVY - 1, 1)) == ("text", "light media", "heavy media")
