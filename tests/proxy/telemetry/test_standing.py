"""Gauges of the fleet as it is now: who has left is shown no more, and a circuit is as bad as any worker's."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from proxy.balancer.fleet import Fleet
from proxy.breaker import Breakers, Thresholds
from proxy.core import Role
from proxy.retry import Blame
from proxy.telemetry.standing import Standing
from proxy.workers.siblings import Kind, Siblings
from tests.support.balancing import balancer
from tests.support.fleets import mixture

URL = "http://x-both0"
CIRCUIT = ("triptych_circuit_state", "x-both0", "both")


def standing(known: Fleet, siblings: Siblings | None = None, failures: int = 0, now: float = 0.0) -> Standing:
    breakers = Breakers(Thresholds(1, 5.0))
    for _ in range(failures):
        breakers.permit(URL).failed(Blame.FAILURE, 0.0)
    return Standing(known, balancer(), breakers, lambda: now, lambda: None, siblings)


def told(one: Standing) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(generate_latest(one).decode())
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_a_circuit_is_a_number() -> None:
    known = mixture(x="both")
    assert told(standing(known))[CIRCUIT] == 0
    assert told(standing(known, failures=1))[CIRCUIT] == 2
    assert told(standing(known, failures=1, now=6.0))[CIRCUIT] == 1, "its next leg is a trial"


def test_load_is_told_in_tokens_and_in_the_time_that_it_will_take() -> None:
    known = mixture(x="both")
    one = standing(known)
    (instance,) = known
    with one._balancer.ledger.lease(instance, instance.role, 1000):
        found = told(one)
        assert found["triptych_load_tokens", "x-both0", "both"] == 1000
        assert found["triptych_leases", "both"] == 1
        seconds = 1000 * one._balancer.rates[instance.role].seconds(URL)
        assert found["triptych_instance_pending_seconds", "x-both0", "both"] == seconds > 0


def test_who_has_left_is_shown_no_more() -> None:
    known = mixture(x="encode both")
    one = standing(known)
    assert ("triptych_circuit_state", "x-both1", "both") in told(one)
    known.remove("http://x-both1")
    assert not [name for name in told(one) if "x-both1" in name]


def test_decode_engines_work_side_by_side_and_have_nothing_pending() -> None:
    names = [
        name for name in told(standing(mixture(x="prefill decode"))) if name[0] == "triptych_instance_pending_seconds"
    ]
    assert [role for *_, role in names] == [Role.PREFILL.label]


async def test_the_worst_circuit_of_all_workers_counts(tmp_path: Path) -> None:
    known, crew = mixture(x="both"), [Siblings(tmp_path, 3, worker) for worker in range(3)]
    mine, theirs = standing(known, crew[0]), standing(known, crew[1], failures=1)
    async with crew[1].listening({Kind.CIRCUITS: theirs.answer}):  # 2 is dead
        await mine.gather()
        assert told(mine)[CIRCUIT] == 2
    await mine.gather()
    assert told(mine)[CIRCUIT] == 0, "what nobody says any more"
