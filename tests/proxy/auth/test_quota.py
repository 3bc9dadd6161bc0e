"""Limits are exact, whoever counts, and come back with time."""

from __future__ import annotations

import os
from itertools import count

import pytest

from proxy.auth import quota
from proxy.auth.keys import Key
from proxy.auth.quota import Quota, Refusal
from proxy.workers.segment import Segment


def key(name: str = "a", **limits: int) -> Key:
    return Key(name=name, hash="blake3:" + "0" * 64, **limits)  # type: ignore[arg-type]


def crew(workers: int) -> list[Quota]:
    buffer = bytearray(quota.size(workers))
    return [Quota(buffer, workers, worker) for worker in range(workers)]


def test_a_minutes_requests_can_be_had_at_once_and_come_back_evenly() -> None:
    used, mine = quota.alone(), key(requests_per_minute=6)
    for _ in range(6):
        assert used.enter(mine, 100.0) is None
        used.leave(mine, 0, 100.0)
    assert used.enter(mine, 100.0) == Refusal("requests_per_minute", 6, pytest.approx(10.0))
    assert used.enter(mine, 109.9) is not None
    assert used.enter(mine, 110.0) is None
    assert used.enter(mine, 110.0) == Refusal("requests_per_minute", 6, pytest.approx(10.0))
    assert [used.enter(mine, 1000.0) for _ in range(7)].count(None) == 6, "no more than a minute's are saved"


@pytest.mark.parametrize("most", [1, 7, 60, 600])
def test_a_rate_is_kept_exactly_for_as_long_as_it_lasts(most: int) -> None:
    used, mine, begun = quota.alone(), key(requests_per_minute=most), 0
    for tick in range(6000):  # of 50 ms: five minutes
        if used.enter(mine, 1e6 + tick * 0.05) is None:
            begun += 1
            used.leave(mine, 0, 1e6 + tick * 0.05)
    assert most * 6 - 1 <= begun <= most * 6


def test_tokens_are_paid_when_they_are_known_and_debts_are_waited_for() -> None:
    used, mine = quota.alone(), key(tokens_per_minute=600)
    assert used.enter(mine, 0.0) is None
    used.spend(mine, 500, 0.0)
    assert used.enter(mine, 0.0) is None, "there are tokens left"
    used.spend(mine, 700, 0.0)
    refusal = used.enter(mine, 0.0)
    assert refusal is not None and refusal.limit == "tokens_per_minute" and refusal.seconds == pytest.approx(60.1)
    used.leave(mine, -700, 0.0)
    assert used.enter(mine, 0.0) is None, "what was predicted and not used is given back"
    used.spend(key("b"), 1000, 0.0)
    assert used.enter(key("b"), 0.0) is None, "nobody counts what has no limit"


def test_places_are_counted_over_all_workers_and_those_of_a_dead_one_are_given_back() -> None:
    one, two = crew(2)
    mine = key(concurrent=3)
    assert [one.enter(mine, 0.0), two.enter(mine, 0.0), two.enter(mine, 0.0)] == [None] * 3
    assert one.enter(mine, 0.0) == two.enter(mine, 0.0) == Refusal("concurrent", 3, 0.0)
    one.leave(mine, 0, 0.0)
    assert two.enter(mine, 0.0) is None and one.enter(mine, 0.0) is not None
    one.clear(1)
    assert [one.enter(mine, 0.0) for _ in range(4)].count(None) == 3
    assert repr(one) == "<Quota 1 keys, 3 requests in flight>"


def test_a_refused_request_takes_nothing() -> None:
    used, mine = quota.alone(), key(requests_per_minute=2, concurrent=1)
    assert used.enter(mine, 0.0) is None
    assert used.enter(mine, 0.0) == Refusal("concurrent", 1, 0.0)
    used.leave(mine, 0, 0.0)
    assert used.enter(mine, 0.0) is None, "of two requests a minute one was left"


def test_processes_that_race_for_the_last_request_grant_it_once() -> None:
    workers, most = 4, 500
    segment = Segment.create(quota.size(workers))
    mine = key(requests_per_minute=most)
    pids = []
    results = [os.pipe() for _ in range(workers)]
    for worker in range(workers):
        if pid := os.fork():
            pids.append(pid)
            continue
        used = Quota(segment.buffer, workers, worker, lambda: segment.locked(0))
        granted = sum(used.enter(mine, 5.0) is None for _ in range(most))
        os.write(results[worker][1], granted.to_bytes(4, "little"))
        os._exit(0)
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
    granted = [int.from_bytes(os.read(read, 4), "little") for read, _ in results]
    for pipe in results:
        for end in pipe:
            os.close(end)
    assert sum(granted) == most
    segment.buffer.release()


def test_keys_that_are_not_in_use_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "ROWS", 4)
    monkeypatch.setattr(quota, "_SHARED", 12)
    used, names = Quota(bytearray(quota.size(1))), (f"k{n}" for n in count())
    busy, slow = key("busy", concurrent=1), key("slow", requests_per_minute=1)
    assert used.enter(busy, 0.0) is None and used.enter(slow, 0.0) is None
    used.leave(slow, 0, 0.0)
    for _ in range(20):
        passing = key(next(names), concurrent=1)
        assert used.enter(passing, 1.0) is None
        used.leave(passing, 0, 1.0)
    assert used.enter(busy, 1.0) is not None and used.enter(slow, 1.0) is not None, "theirs is remembered"
    for _ in range(2):
        assert used.enter(key(next(names), concurrent=1), 1.0) is None
    with pytest.raises(LookupError, match="4 API keys"):
        used.enter(key("late", concurrent=1), 1.0)
    assert used.enter(key("late", concurrent=1), 61.0) is None, "the slow one's minute is over"
