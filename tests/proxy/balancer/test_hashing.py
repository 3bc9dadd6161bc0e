"""Hashes are the same everywhere, and ranks of each key are an order of its own."""

from __future__ import annotations

import numpy as np

from proxy.balancer.hashing import hash64, hashes, highest, owner, rank


def test_hashes_are_those_of_every_process() -> None:
    assert hash64("http://h:1") == int(hashes("http://h:1", 1)[0]) == 0x4945263A678C5A94
    assert len(np.unique(hashes("http://h:1", 64))) == 64
    assert hashes("a", 3)[0] == hash64("a")


def test_an_owner_is_a_positive_number_of_a_signed_cell() -> None:
    found = [owner(f"http://h:{port}") for port in range(1000)]
    assert len(set(found)) == 1000 and all(0 < one < 1 << 63 for one in found)
    assert owner("http://h:1") == 0x4945263A678C5A94 >> 1 | 1


def test_each_key_orders_the_members_in_its_own_way_and_all_are_first_equally_often() -> None:
    members = np.concatenate([hashes(f"http://h:{port}", 1) for port in range(10)])
    first = np.bincount([highest(members, f"key {number}") for number in range(10_000)])
    assert len(first) == 10
    assert (np.abs(first - 1000) < 5 * 30).all(), first  # five standard deviations


def test_the_highest_rank_is_found_among_few_and_many() -> None:
    members = [hash64(f"http://h:{port}") for port in range(100)]
    for count in (1, 5, 8, 9, 20, 100):
        for key in ("cat", "dog"):
            best = max(members[:count], key=lambda member: rank(member, hash64(key)))
            assert highest(np.array(members[:count], np.uint64), key) == members.index(best)
