"""The corrected guess: that it finds the truth, forgets, and believes nobody too much."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.media.text import Text


def taught(*told: tuple[int, int]) -> Text:
    text = Text()
    for nbytes, tokens in told:
        text.learn("m", nbytes, tokens)
    return text


def test_four_bytes_are_a_token_until_somebody_counts() -> None:
    assert [Text().tokens("m", n) for n in (0, 3, 400)] == [1, 1, 100]


@pytest.mark.parametrize("per_byte", [0.1, 0.22, 0.33, 1.0])
def test_the_guess_becomes_what_engines_count(per_byte: float) -> None:
    dice = random.Random(1)
    sizes = [dice.randrange(50, 20_000) for _ in range(200)]
    text = taught(*((n, round(n * per_byte)) for n in sizes))
    assert text.tokens("m", 10_000) == pytest.approx(10_000 * per_byte, rel=0.02)
    assert text.tokens("other", 10_000) == 2500, "each model has a tokenizer of its own"


def test_the_template_of_short_prompts_counts_little() -> None:
    """Four bytes and a template of 20 tokens, many times, between long prompts of four bytes a token."""
    text = taught(*(pair for _ in range(50) for pair in [(4, 21), (4, 21), (4, 21), (8000, 2020)]))
    assert text.tokens("m", 8000) == pytest.approx(2020, rel=0.02)


def test_one_wild_answer_moves_little_and_is_forgotten() -> None:
    text = taught(*[(4000, 1000)] * 100)
    text.learn("m", 4000, 1_000_000)
    assert text.tokens("m", 4000) < 1030
    for _ in range(100):
        text.learn("m", 4000, 1000)
    assert text.tokens("m", 4000) == pytest.approx(1000, rel=0.005)


def test_another_tokenizer_behind_a_name_is_learnt_anew() -> None:
    text = taught(*[(4000, 1000)] * 500, *[(4000, 3000)] * 300)
    assert text.tokens("m", 4000) == pytest.approx(3000, rel=0.05)


def test_what_cannot_be_teaches_nothing() -> None:
    text = taught((0, 50), (400, 0), (400, -3))
    assert text.tokens("m", 400) == 100 and text.shown() == {}


def test_models_are_forgotten_in_the_order_in_which_they_were_learnt() -> None:
    text = taught(*[(40_000, 40_000)] * 100)
    for n in range(300):
        text.learn(f"m{n}", 4000, 1000)
        if n < 200:
            text.learn("m", 4000, 4000)
    assert len(text.shown()) == 256 and text.tokens("m0", 400) == 100
    assert text.tokens("m", 400) > 300 and text.shown()["m"] == pytest.approx(1, abs=0.2)


@given(st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(-5, 1 << 40)), max_size=30), st.integers(0, 1 << 30))
def test_a_guess_is_always_a_number_of_tokens(told: list[tuple[int, int]], nbytes: int) -> None:
    assert 1 <= taught(*told).tokens("m", nbytes) < 1 << 62
