"""Every dialect offered keeps the contract that all share."""

import pytest

from proxy import dialects
from proxy.core import Api, Job, Order
from proxy.dialects.base import Dialect

BODY = {"zeta": 1, "model": "m", "prompt": "hi", "stream": True, "alpha": [None, 2.5]}


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("name", dialects.DIALECTS)
def test_bodies_keep_unknown_fields_and_key_order_and_the_job_stays_as_it_was(name: str, order: Order) -> None:
    dialect: Dialect = dialects.DIALECTS[name](order)
    job = Job("id", Api.COMPLETIONS, dict(BODY), (), 1, 1, True)
    for body in (dialect.whole(job, {}), dialect.decode(job, {}, None, "http://m"), dialect.prefill(job, {}, None)):
        assert [key for key in body if key in BODY] == list(BODY)
        assert body["alpha"] == BODY["alpha"]
    assert job.body == BODY
    assert dialect.name == name and dialect.order is order


def test_every_known_engine_has_a_dialect() -> None:
    assert set(dialects.ENGINES.values()) <= set(dialects.DIALECTS)
