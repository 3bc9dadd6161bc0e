"""Chains of prompts, and who holds how much of one."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from proxy import openai
from proxy.balancer.prefix import Chain, Prefixes
from proxy.core import Api, Job
from proxy.openai import Identity
from tests.fakes.media import image, part

A, B = image(56, 56), image(84, 56)


def job(body: dict[str, Any], api: Api = Api.CHAT) -> Job:
    return openai.parse(orjson.dumps(body), api, "id", Identity())


def said(*texts: Any, **fields: Any) -> Job:
    """A conversation, by turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return job({"model": "m", "messages": messages, **fields})


def common(one: Job, other: Job) -> int:
    """How many blocks both begin with."""
    pairs = zip(Chain.of(one).keys, Chain.of(other).keys, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(Chain.of(j).keys) for j in (one, other)))


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def test_a_chain_is_of_whole_blocks_and_ends_at_items() -> None:
    j = said([text("x" * 1500), part(A), text("y" * 600), part(B), text("z" * 100)])
    chain = Chain.of(j)
    assert len(chain.keys) == len(chain.ends) == 7, "three of text, an image, two of text, an image"
    assert chain.items == {0: 3, 1: 6}
    assert list(chain.ends) == sorted(chain.ends) and chain.ends[-1] <= j.prompt_tokens
    assert chain.ends[3] - chain.ends[2] == j.items[0].tokens
    assert chain.covered(chain.ends[3]) == {0} and chain.covered(chain.ends[6]) == {0, 1}
    assert chain.covered(chain.ends[3] - 1) == frozenset()


def test_a_conversation_that_goes_on_begins_as_it_did() -> None:
    first, second = said("x" * 3000), said("x" * 3000, "y" * 900, "z" * 900)
    assert common(first, second) == len(Chain.of(first).keys) == 5
    assert common(first, said("y" + "x" * 2999)) == 0
    assert common(said([part(A), text("x" * 600)]), said([part(B), text("x" * 600)])) == 1, "what stands before it"


def test_what_keeps_engines_from_sharing_keeps_chains_apart() -> None:
    plain = said("x" * 3000)
    assert common(plain, said("x" * 3000, temperature=1)) == 5
    for fields in ({"cache_salt": "s"}, {"tools": [{"type": "function"}]}, {"chat_template_kwargs": {"think": True}}):
        assert common(plain, said("x" * 3000, **fields)) == 0
    assert common(plain, job({"model": "other", "messages": [{"role": "user", "content": "x" * 3000}]})) == 0


def test_an_image_is_no_text_that_is_called_like_it() -> None:
    j = said([part(A)])
    name = j.items[0].identity
    assert common(j, said([text(name), part(B)])) == 0


def test_completions_have_chains_whatever_their_prompt_is() -> None:
    one = job({"model": "m", "prompt": "x" * 2000}, Api.COMPLETIONS)
    assert len(Chain.of(one).keys) == 3
    tokens = [*range(1000)]
    several: list[Any] = [tokens, [tokens, tokens]]
    assert all(len(Chain.of(job({"model": "m", "prompt": p}, Api.COMPLETIONS)).keys) > 2 for p in several)


def test_odd_messages_have_a_chain_and_a_long_one_an_end() -> None:
    odd = {"model": "m", "messages": ["?", {"role": "tool"}, {"role": "user", "content": [3, {"type": "odd"}]}]}
    assert Chain.of(job(odd)).keys == []
    assert len(Chain.of(said("x" * 3_000_000)).keys) == 1024
    assert Chain.of(said(["x" * 9, text("x" * 3_000_000), part(A)])).items == {}


def test_a_short_beginning_may_be_passed_over() -> None:
    prefixes, chain = Prefixes(), Chain((1, 2), (4, 300), {})
    prefixes.placed("a", chain)
    prefixes.placed("b", Chain((1,), (4,), {}))
    assert prefixes.matched(chain) == {"a": 300, "b": 4}
    assert prefixes.matched(chain, 32) == {"a": 300}


def test_what_is_held_is_told_by_tokens_and_forgotten_whole() -> None:
    prefixes, short, long = Prefixes(), Chain.of(said("x" * 1100)), Chain.of(said("x" * 3000))
    prefixes.placed("a", short)
    prefixes.placed("b", long)
    found = prefixes.matched(long)
    assert found == {"a": long.ends[1], "b": long.ends[4]}
    assert prefixes.matched(Chain.of(said("y" * 3000))) == {}
    prefixes.forget("b")
    prefixes.forget("nobody")
    assert (prefixes.matched(long), set(prefixes.urls)) == ({"a": long.ends[1]}, {"a"})
    prefixes.forget("a")
    assert len(prefixes) == 0 and repr(prefixes) == "<Prefixes {}>"


class Naive:
    """Each instance's blocks in the order of their last use, searched through."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held: dict[str, OrderedDict[int, None]] = {}

    def placed(self, url: str, keys: list[int]) -> None:
        held = self.held.setdefault(url, OrderedDict())
        for key in reversed(keys):
            held.pop(key, None)
            held[key] = None
        while len(held) > max(64, self.most // len(self.held)):
            held.popitem(last=False)

    def matched(self, chain: Chain) -> dict[str, int]:
        found = {}
        for url, held in self.held.items():
            for key, end in zip(chain.keys, chain.ends, strict=True):
                if key not in held:
                    break
                found[url] = end
        return found


STEPS = st.lists(
    st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 9)),
    max_size=60,
)


@given(STEPS)
def test_it_is_a_bounded_list_per_instance_whatever_happens(steps: list[tuple[str, list[int], int]]) -> None:
    prefixes, naive = Prefixes(150), Naive(150)
    for url, content, forgets in steps:
        keys: list[int] = []
        for number in content:
            keys.append(hash((keys[-1] if keys else 0, number)))
        chain = Chain(keys, [10 * (n + 1) for n in range(len(keys))], {})
        if forgets == 0:
            prefixes.forget(url)
            naive.held.pop(url, None)
        else:
            prefixes.placed(url, chain)
            naive.placed(url, keys)
        assert prefixes.matched(chain) == naive.matched(chain)
        assert len(prefixes) == sum(map(len, naive.held.values()))
