from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from engines.language.choices import Choice, Logprob, Piece, Scored
from engines.language.sequence import SamplingParams
from engines.language.stream import Token
from engines.language.tokenizer import ChatTokenizer
from tests.support.checkpoints import checkpoint


@cache
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(checkpoint("qwen2_5_vl"))


def make(**params: Any) -> Choice:
    return Choice(0, tokenizer(), SamplingParams(**{"max_tokens": 99, **params}))


def tokens(text: str, finish_reason: str | None = None) -> list[Token]:
    ids = tokenizer().encode(text)
    return [Token(0, one, finish_reason=finish_reason if n == len(ids) - 1 else None) for n, one in enumerate(ids)]


def test_text_comes_whole_character_by_character() -> None:
    choice = make()
    parts = [choice.push([token]).text for token in tokens("aé€🦊z", "length")]
    assert [part for part in parts if part] == ["a", "é", "€", "🦊", "z"]
    assert (choice.text, choice.finish_reason, choice.num_tokens) == ("aé€🦊z", "length", len(parts))


def test_a_character_that_is_never_completed_shows_at_the_end() -> None:
    choice = make()
    assert choice.push(tokens("€", None)[:2]).text == ""
    last = tokens("€")[:1][0]
    assert choice.push([Token(0, last.token_id, finish_reason="length")]).text == "\ufffd\ufffd"


def test_a_token_that_stops_is_counted_and_not_shown() -> None:
    choice = make()
    assert choice.push(tokens("ab", "stop")) == Piece(0, "a", 0, (), "stop", (97, 98))
    assert choice.num_tokens == 2


def test_a_stop_string_ends_the_choice_and_what_follows_is_ignored() -> None:
    choice = make(stop=("bc",))
    shown = [choice.push([token]).text for token in tokens("aabcde")]
    assert (shown, choice.text) == (["a", "a", "", "", "", ""], "aa")
    assert (choice.stopped, choice.finish_reason, choice.num_tokens) == (True, "stop", 4)


def test_what_was_held_back_comes_with_the_end() -> None:
    choice = make(stop=("bcd",))
    assert choice.push(tokens("abc")).text == "a"
    assert choice.push(tokens("x", "length")) == Piece(0, "bcx", 1, (), "length", (120,))
    held = make(stop=("bcd",))
    assert held.push(tokens("abc", "length")).text == "abc"


def test_min_tokens_come_before_stop_strings() -> None:
    choice = make(stop=("b",), min_tokens=3)
    choice.push(tokens("abbab"))
    assert choice.text == "abba"
    assert choice.num_tokens == 5


def test_logprobs_follow_their_tokens() -> None:
    a, b = tokenizer().encode("ab")
    piece = make(logprobs=1).push([Token(0, a, -0.5, ((b, -0.25),))])
    assert piece.scored == (Scored(Logprob(b"a", -0.5), (Logprob(b"b", -0.25),)),)
    assert piece
    assert not Piece(0, "", 5)


@pytest.mark.parametrize("done", range(1, 8))
def test_what_follows_replayed_tokens_fits_to_them(done: int) -> None:
    said = tokens("a€bcd🙂"[:5])
    whole, halved = make(stop=("bx",)), make(stop=("bx",))
    shown = [whole.push([token]).text for token in said]
    halved.replay(token.token_id for token in said[:done])
    assert [halved.push([token]).text for token in said[done:]] == shown[done:]
    assert halved.num_tokens == whole.num_tokens
    assert halved.text == "".join(shown[done:])
