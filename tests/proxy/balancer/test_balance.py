"""Choosing and charging are one step."""

from proxy.balancer import POLICIES
from proxy.balancer.balance import Balancer
from proxy.core import Instance, Role


def balancer() -> Balancer:
    return Balancer({role: POLICIES["least_loaded"]() for role in Role})


def test_what_is_taken_is_seen_by_the_next_choice() -> None:
    instances = [Instance(f"http://h:{port}", Role.DECODE, "native") for port in range(3)]
    b = balancer()
    leases = [b.take(Role.DECODE, instances, tokens) for tokens in (100, 10, 50, 10)]
    assert [lease.instance.url[-1] for lease in leases] == ["0", "1", "2", "1"]
    leases[0].close()
    assert b.take(Role.DECODE, instances, 0).instance.url == "http://h:0"
    assert b.ledger.load("http://h:0") == 1, "nothing is free"
    b.ledger.check()


def test_roles_have_policies_of_their_own() -> None:
    b = balancer()
    prefill, decode = Instance("http://p", Role.PREFILL, "native"), Instance("http://d", Role.DECODE, "native")
    b.take(Role.PREFILL, [prefill], 5)
    assert b.take(Role.DECODE, [decode], 5).instance is decode


def test_a_forgotten_instance_returns_its_leases_quietly() -> None:
    b = balancer()
    instance = Instance("http://d", Role.DECODE, "native")
    lease = b.take(Role.DECODE, [instance], 5)
    b.forget(instance)
    lease.close()
    assert b.ledger.leases() == b.ledger.load("http://d") == 0
