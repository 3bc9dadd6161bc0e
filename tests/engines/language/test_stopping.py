from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.language.sequence import SamplingParams, Sequence
from engines.language.stopping import StopStrings, finish_reason

EOS = {9}


@pytest.mark.parametrize(
    ("output", "params", "reason"),
    [
        ([1], SamplingParams(max_tokens=3), None),
        ([1, 2, 3], SamplingParams(max_tokens=3), "length"),
        ([9], SamplingParams(max_tokens=3), "stop"),
        ([9], SamplingParams(max_tokens=3, ignore_eos=True), None),
        ([9], SamplingParams(max_tokens=3, min_tokens=2), None),
        ([1, 9], SamplingParams(max_tokens=2, min_tokens=2), "stop"),
        ([5], SamplingParams(max_tokens=3, stop_token_ids=(5,), ignore_eos=True), "stop"),
    ],
)
def test_tokens_end_a_sequence(output: list[int], params: SamplingParams, reason: str | None) -> None:
    assert finish_reason(Sequence("s", [1, 2, *output], 2, params), EOS) == reason


def test_a_stop_string_never_shows_in_part() -> None:
    stops = StopStrings(["END"])
    assert [stops.push(text) for text in ("a E", "N", "x E", "ND tail", "more")] == ["a ", "", "ENx ", "", ""]
    assert stops.stopped


def test_what_was_held_back_comes_when_the_text_ends() -> None:
    stops = StopStrings(["END"])
    assert stops.push("the EN") == "the "
    assert stops.flush() == "EN"
    assert stops.flush() == ""


def test_the_first_stop_in_the_text_wins() -> None:
    assert StopStrings(["yy", "x"]).push("a x yy") == "a "


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_any_way_of_cutting_the_text_shows_the_same(pieces: list[str], stops: list[str]) -> None:
    checker = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += checker.push(piece)
        if checker.stopped:
            break
        assert not any(stop in shown for stop in stops)
    shown += checker.flush()
    text = "".join(pieces)
    ends = [text.find(stop) for stop in stops if stop in text]
    if not ends:
        assert shown == text
    else:
        assert checker.stopped
        assert not any(stop in shown for stop in stops)
        assert text.startswith(shown)
