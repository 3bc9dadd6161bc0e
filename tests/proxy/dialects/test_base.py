"""Every dialect offered keeps the contract that all share."""

import pytest

from proxy import dialects
from proxy.core import Api, Instance, Job, Order, Role
from proxy.dialects import Speakers
from proxy.dialects.base import Dialect, Options

BODY = {"zeta": 1, "model": "m", "prompt": "hi", "stream": True, "alpha": [None, 2.5]}

FACTS = {"bootstrap": "http://p:8998", "engine_ids": {"0": "e"}, "bootstrap_port": 8998}


@pytest.mark.parametrize("order", [None, *Order])
@pytest.mark.parametrize("name", dialects.DIALECTS)
def test_bodies_keep_unknown_fields_and_key_order_and_the_job_stays_as_it_was(name: str, order: Order | None) -> None:
    dialect: Dialect = Speakers(Options(order))(Instance("http://p:1", Role.PREFILL, name, facts=FACTS))
    job = Job("id", Api.COMPLETIONS, dict(BODY), (), 1, 1, True)
    handoff = dialect.rendezvous(job, 7) if dialect.order is Order.TOGETHER else None
    shaped = (dialect.whole(job, {}), dialect.decode(job, {}, handoff, "http://m"), dialect.prefill(job, {}, handoff))
    for body in shaped:
        assert [key for key in body if key in BODY] == list(BODY)
        assert body["alpha"] == BODY["alpha"]
    assert job.body == BODY
    assert dialect.name == name


def test_an_instance_keeps_its_dialect_until_it_turns_out_to_be_another_or_is_another() -> None:
    speakers = Speakers(Options())
    one = Instance("http://p:1", Role.PREFILL, "native")
    assert speakers(one) is speakers(one)
    assert speakers(Instance("http://p:1", Role.PREFILL, "native")) is not speakers(one)
