"""Names of blocks: equal where the KV is, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

from engines.language.prefix import names
from engines.language.sequence import Item, SamplingParams, Sequence

IMAGE = Item("cat", "image", (1, 4, 4), offset=6, num_tokens=4)


def named(tokens: list[int], *items: Item, count: int = 3, size: int = 4) -> list[bytes]:
    return names(Sequence("s", tokens, len(tokens), SamplingParams(1), items), count, size)


def alike(one: list[bytes], other: list[bytes]) -> list[bool]:
    return [a == b for a, b in zip(one, other, strict=True)]


TOKENS = list(range(12))


def test_a_name_depends_on_all_tokens_up_to_its_block_and_on_none_behind() -> None:
    assert named(TOKENS) == named([*TOKENS, 99])
    changed = [*TOKENS[:5], 50, *TOKENS[6:]]
    assert alike(named(TOKENS), named(changed)) == [True, False, False]
    assert alike(named([1, 2, 3, 4] * 3), named([1, 2, 3, 4] * 3)) == [True] * 3
    assert len(set(named([1, 2, 3, 4] * 3))) == 3, "the same tokens elsewhere are another block"


def test_an_item_is_part_of_every_block_it_reaches_into_and_of_those_behind() -> None:
    plain = named(TOKENS, IMAGE)
    assert alike(plain, named(TOKENS)) == [True, False, False]
    others = ({"mm_hash": "dog"}, {"grid": (1, 2, 8)}, {"offset": 7}, {"row": 4}, {"interval": 2.0})
    for other in (replace(IMAGE, **changes) for changes in others):
        assert alike(plain, named(TOKENS, other)) == [True, False, False]
    assert alike(plain, named(TOKENS, IMAGE, replace(IMAGE, offset=10, mm_hash="dog"))) == [True, True, False]


def test_names_are_made_once_and_more_are_added() -> None:
    seq = Sequence("s", TOKENS, 12, SamplingParams(1))
    first = names(seq, 1, 4)
    assert names(seq, 3, 4)[:1] == first
    assert seq.names == named(TOKENS)
    assert names(seq, 2, 4) == seq.names[:2]
