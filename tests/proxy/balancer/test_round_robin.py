"""Turns, also while the candidates change."""

from proxy.balancer.round_robin import RoundRobin


def test_a_newcomer_is_next_and_a_leaver_is_skipped() -> None:
    policy = RoundRobin()
    assert [policy.choose(["a", "b"]) for _ in range(3)] == ["a", "b", "a"]
    assert policy.choose(["a", "b", "c"]) == "c"
    assert policy.choose(["a", "c"]) == "a"
    policy.forget("a")
    assert policy.choose(["a", "b", "c"]) == "a"


def test_load_does_not_matter() -> None:
    policy = RoundRobin()
    policy.changed("a", 1000)
    assert policy.choose(["a", "b"]) == "a"
