from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, generate_latest

from engines.colocated.app import over


def test_a_registry_over_others_tells_theirs_and_they_do_not_tell_its_own() -> None:
    parts = [CollectorRegistry(), CollectorRegistry()]
    Counter("first", "of one part", registry=parts[0])
    whole = over(*parts)
    Counter("second", "added to a part later", registry=parts[1]).inc()
    Counter("third", "of the whole", registry=whole)
    told = generate_latest(whole).decode()
    assert "first_total 0.0" in told and "second_total 1.0" in told and "third_total 0.0" in told
    assert not any("third" in generate_latest(part).decode() for part in parts)
