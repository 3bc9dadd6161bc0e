"""The nouns: labels that other programs read, and the route receipt."""

from dataclasses import replace

import pytest

from proxy.core import BOTH, Api, Instance, Item, Job, Leg, Path, Plan, Role


def test_a_combined_engine_is_a_composition() -> None:
    assert Role.PREFILL in BOTH and Role.DECODE in BOTH and Role.ENCODE not in BOTH
    assert [role.label for role in (Role.ENCODE, Role.PREFILL, Role.DECODE, BOTH)] == [
        "encode",
        "prefill",
        "decode",
        "both",
    ]
    assert Role.named("prefill_decode") == Role.named("both") == BOTH


def test_the_receipt_names_every_leg_and_the_reason() -> None:
    def at(port: int, role: Role) -> Instance:
        return Instance(f"http://h:{port}", role, "native")

    plan = Plan(
        Path.E_P_D,
        "2 items, prefill and decode apart",
        (
            Leg(Role.ENCODE, at(1, Role.ENCODE)),
            Leg(Role.ENCODE, at(2, Role.ENCODE)),
            Leg(Role.PREFILL, at(3, Role.PREFILL)),
            Leg(Role.DECODE, at(4, Role.DECODE)),
        ),
    )
    assert str(plan) == ("E-P-D; encode=h:1,h:2; prefill=h:3; decode=h:4; reason=2 items, prefill and decode apart")
    assert str(replace(plan, foreseen=0.4124)).endswith("; decode=h:4; foreseen=412ms; reason=" + plan.reason)
    assert plan.leg(Role.PREFILL).instance.url == "http://h:3"
    with pytest.raises(LookupError, match="no both leg"):
        plan.leg(BOTH)


def test_a_job_costs_its_text_and_its_media() -> None:
    items = tuple(Item(i, 0, i, "image", {}, None, f"u{i}", 100) for i in range(2))
    assert Job("id", Api.CHAT, {}, items, 7, 16, False).prompt_tokens == 207
    assert items[1].param == "messages[0].content[1]"
