"""Rate matching against brute force: the fewest engines, the best split, the bottleneck, what one more buys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from math import inf, isclose

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.advice.capacity import LIMITS, Advice, Carried, Limits, Move, Offered, advise, best_move
from proxy.core import BOTH, Role

E, P, D = Role.ENCODE, Role.PREFILL, Role.DECODE
KINDS = ((P, D), (BOTH,), (E, P, D), (E, BOTH), (E, P, D, BOTH))


def carries(offered: Offered, carried: Carried, engines: Mapping[Role, int]) -> float:
    """The most requests per second, by trying every share of the combined engines."""
    encode, prefill, decode = offered.encode / carried.encode, offered.prompt, offered.output
    loads = {E: encode, P: prefill / carried.prefill, D: decode / carried.decode}
    if E not in engines:
        loads[P] += loads.pop(E)
    best = 0.0
    both, limit = engines.get(BOTH, 0), LIMITS.of(BOTH, 0.0)
    for step in range(401):
        lent = both * step / 400
        # What a combined engine may do is less than a decode engine may, so its share counts by its own limit.
        room = {
            E: engines.get(E, 0) * LIMITS.of(E, offered.spread),
            P: engines.get(P, 0) * LIMITS.prefill + lent * limit,
            D: engines.get(D, 0) * LIMITS.decode + (both - lent) * limit,
        }
        best = max(best, min(room[s] / load for s, load in loads.items() if load))
    return best * offered.requests


def splits(carried: Carried, engines: int) -> Iterator[dict[Role, int]]:
    roles = [r for r in carried.engines if r is not BOTH or P not in carried.engines]
    kept = {r: n for r, n in carried.engines.items() if r not in roles}
    for counts in product(range(1, engines + 1), repeat=len(roles)):
        if sum(counts) == engines - sum(kept.values()):
            yield {**dict(zip(roles, counts, strict=True)), **kept}


rate = st.floats(0.5, 400)
offers = st.builds(Offered, st.floats(0.1, 50), st.one_of(st.just(0.0), rate), rate, rate, st.floats(0, 6))
fleets = st.sampled_from(KINDS).flatmap(
    lambda kinds: st.builds(
        Carried, st.fixed_dictionaries({kind: st.integers(1, 4) for kind in kinds}), *[st.floats(20, 400)] * 3
    )
)


@given(offers, fleets)
def test_what_a_fleet_carries_is_what_the_best_sharing_of_its_engines_carries(
    offered: Offered, carried: Carried
) -> None:
    found = advise(offered, carried)
    expected = carries(offered, carried, carried.engines)
    assert isclose(found.carries, expected, rel_tol=0.03)
    weakest = max(found.needs, key=lambda need: need.utilisation / need.limit)
    assert found.bottleneck is weakest.role
    assert isclose(found.carries, weakest.carries)
    assert all(need.carries >= found.carries * (1 - 1e-9) for need in found.needs)


@given(offers, fleets)
def test_the_fewest_engines_carry_the_load_and_one_less_of_any_would_not(offered: Offered, carried: Carried) -> None:
    advised = advise(offered, carried).advised
    assert carries(offered, carried, advised) >= offered.requests * 0.97
    if P not in advised or BOTH not in advised:
        assert advise(offered, Carried(advised, carried.encode, carried.prefill, carried.decode)).advised == advised
        for role, count in advised.items():
            fewer = carries(offered, carried, {**advised, role: count - 1})
            assert count == 1 or fewer < offered.requests * (1 + 1e-6), role


@given(offers, fleets, st.integers(4, 9))
def test_a_split_of_so_many_engines_carries_what_the_best_of_all_splits_carries(
    offered: Offered, carried: Carried, more: int
) -> None:
    engines = more + (carried.engines[BOTH] if P in carried.engines and BOTH in carried.engines else 0)
    found = advise(offered, carried, engines)
    assert sum(found.advised.values()) == engines
    best = max(carries(offered, carried, split) for split in splits(carried, engines))
    assert found.would_carry >= best * 0.97


@given(offers, fleets)
def test_one_more_engine_buys_what_the_greater_fleet_carries_more(offered: Offered, carried: Carried) -> None:
    found = advise(offered, carried)
    for need in found.needs:
        greater = Carried(
            {**carried.engines, need.role: need.engines + 1}, carried.encode, carried.prefill, carried.decode
        )
        assert isclose(need.one_more, advise(offered, greater).carries - found.carries, abs_tol=1e-6)
        assert need.one_more >= -1e-9
        if need.carries > found.carries * 1.01 and BOTH not in carried.engines:
            assert need.one_more == pytest.approx(0), "only the bottleneck is worth an engine"


def test_the_more_encodes_differ_the_less_an_encoder_is_kept_busy() -> None:
    busy = [Limits().of(E, spread) for spread in (0.0, 1.0, 3.0, 4.3)]
    assert busy == pytest.approx([8 / 9, 0.8, 2 / 3, 0.6], abs=0.01)
    assert Limits(wait=1000).of(E, 1.0) == 0.9
    # Pollaczek and Khinchine's mean wait at that limit is the one that is allowed.
    rho = Limits().of(E, 3.0)
    assert rho / (1 - rho) * (1 + 3.0) / 2 == pytest.approx(Limits().wait)


def example(advised: int | None = None, **engines: int) -> Advice:
    """A request per second takes an encoder 0.6 s, a prefill engine 0.45 s and a decode engine 0.23 s."""
    return advise(
        Offered(2.0, 1200, 900, 460, spread=1.0),
        Carried({Role.named(name): count for name, count in engines.items()}, 1000, 1000, 1000),
        advised,
    )


def test_an_example_by_hand() -> None:
    found = example(encode=1, prefill=2, decode=1)
    assert [(n.role, n.advised) for n in found.needs] == [(E, 2), (P, 1), (D, 1)]
    assert found.bottleneck is E
    assert found.carries == pytest.approx(2.0 * 0.8 / 1.2)
    # With a second encoder it would be decode's turn at 2 · 0.92/0.46 = 4 and encode's before it, at 2 · 1.6/1.2.
    assert found.needs[0].one_more == pytest.approx(2.0 * 0.8 / 1.2)
    assert (found.needs[1].one_more, found.needs[2].one_more) == (0, 0)
    assert found.needs[1].carries == pytest.approx(2.0 * 1.8 / 0.9)
    assert example(9, encode=1, prefill=1, decode=1).advised == {E: 4, P: 3, D: 2}
    assert example(both=1).advised == {BOTH: 3}, "without encoders, whoever prefills encodes"


def test_a_stage_without_an_engine_carries_nothing() -> None:
    found = example(encode=0, both=2)
    assert found.bottleneck is E and found.carries == 0 and found.needs[0].utilisation == inf
    assert found.needs[0].one_more > 0 == found.needs[1].one_more


@pytest.mark.parametrize(
    ("offered", "carried", "engines", "why"),
    [
        (Offered(0.0, 0, 0, 0), Carried({BOTH: 1}, 1, 1, 1), None, "nothing is offered"),
        (Offered(1.0, 0, 1, 1), Carried({BOTH: 1}, 1, 0, 1), None, "carries nothing"),
        (Offered(1.0, 0, 1, 1), Carried({E: 1, P: 1}, 1, 1, 1), None, "no role of the fleet can answer"),
        (Offered(1.0, 0, 1, 1), Carried({E: 1, P: 1, D: 1}, 1, 1, 1), 2, "2 engines"),
    ],
)
def test_numbers_that_say_nothing(offered: Offered, carried: Carried, engines: int | None, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        advise(offered, carried, engines)


@settings(max_examples=30)
@given(offers, fleets)
def test_the_best_move_is_the_best_of_all(offered: Offered, carried: Carried) -> None:
    before = carries(offered, carried, carried.engines)
    tried = {
        (source, target): carries(
            offered,
            carried,
            {**carried.engines, source: carried.engines[source] - 1, target: carried.engines[target] + 1},
        )
        for source, target in ((P, D), (D, P))
        if {P, D} <= carried.engines.keys() and carried.engines[source] > 1
    }
    move = best_move(offered, carried)
    if move is None:
        assert all(after <= before * 1.01 for after in tried.values())
    else:
        assert isclose(move.carries, before, rel_tol=0.01)
        assert isclose(move.would_carry, tried[move.source, move.target], rel_tol=0.01)
        assert move.would_carry >= max(tried.values()) * 0.99


def test_a_move_goes_to_the_stage_that_gives_way() -> None:
    offered = Offered(10.0, 0.0, 1000.0, 10.0)
    assert best_move(offered, Carried({P: 1, D: 3}, 1.0, 500.0, 100.0)) == Move(D, P, 4.5, 9.0)
    assert best_move(offered, Carried({P: 1, D: 1}, 1.0, 500.0, 100.0)) is None, "the last of a role stays"
    assert best_move(offered, Carried({P: 3, D: 1}, 1.0, 500.0, 100.0)) is None, "prefill needs all that it has"
    assert best_move(offered, Carried({BOTH: 3}, 1.0, 500.0, 100.0)) is None
    with pytest.raises(ValueError, match="nothing is offered"):
        best_move(Offered(0.0, 0.0, 0.0, 0.0), Carried({P: 1, D: 3}, 1.0, 1.0, 1.0))
