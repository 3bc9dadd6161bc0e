from __future__ import annotations

import itertools

import pytest

from engines.language.sequence import TRANSITIONS, SamplingParams, Sequence, Status


def sequence(**changes: object) -> Sequence:
    fields: dict[str, object] = {
        "id": "s",
        "token_ids": [1, 2, 3],
        "num_prompt_tokens": 3,
        "params": SamplingParams(max_tokens=4, seed=5, n=3),
    }
    return Sequence(**{**fields, **changes})  # type: ignore[arg-type]


def test_counts_follow_the_tokens() -> None:
    seq = sequence()
    assert (seq.num_tokens, seq.num_output_tokens, seq.remaining, seq.output_ids) == (3, 0, 3, [])
    seq.num_computed = 3
    seq.token_ids.append(9)
    assert (seq.num_tokens, seq.num_output_tokens, seq.remaining, seq.output_ids) == (4, 1, 1, [9])


@pytest.mark.parametrize(("old", "new"), list(itertools.product(Status, Status)))
def test_status_moves_by_the_table_only(old: Status, new: Status) -> None:
    seq = sequence(status=old)
    if new in TRANSITIONS[old]:
        seq.move(new)
        assert seq.status is new
        return
    with pytest.raises(RuntimeError, match=f"s cannot go from {old.name} to {new.name}"):
        seq.move(new)
    assert seq.status is old


def test_a_fork_has_the_prompt_its_own_dice_and_no_blocks() -> None:
    seq = sequence(block_table=[4], num_computed=3)
    seq.token_ids.append(9)
    fork = seq.fork(2)
    assert fork.token_ids == [1, 2, 3]
    assert fork.params.seed == 7
    assert fork.params.n == 1
    assert fork.index == 2
    assert fork.block_table == []
    assert sequence(params=SamplingParams(max_tokens=1)).fork(1).params.seed is None


def test_repr_is_a_dashboard() -> None:
    assert repr(sequence(block_table=[4])) == "<Sequence s WAITING prompt=3 output=0 computed=0 blocks=[4]>"
