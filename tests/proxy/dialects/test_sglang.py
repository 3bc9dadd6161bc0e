"""SGLang's wire, body by body: the same for 0.5.10 and 0.5.23."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy import openai
from proxy.core import BOTH, Api, Instance, Job, Order, Role
from proxy.dialects.base import Options
from proxy.dialects.sglang import Sglang, request_id, rid
from proxy.openai import Identity
from tests.fakes.media import chat, image, part

A = part(image(8, 8))
PREFILL = Sglang(Options(), Instance("http://p1:30000", Role.PREFILL, "sglang", facts={"bootstrap_port": 8998}))
ROOM = (1 << 62) + 77


def job(body: dict[str, Any], api: Api = Api.CHAT, id: str = "r1") -> Job:
    return openai.parse(orjson.dumps(body), api, id, Identity())


GOLDEN_PAIR = {
    "bootstrap_host": "p1",
    "bootstrap_port": 8998,
    "bootstrap_room": 1 << 62,
}


def test_prefill_and_decode_get_one_body_and_meet_in_a_room_of_ours() -> None:
    sent = chat(A, stream=True, stream_options={"include_usage": True}, max_tokens=5, n=2, odd={"kept": 1})
    sent |= {"bootstrap_room": 1, "bootstrap_host": "evil", "bootstrap_port": 9, "rid": "theirs"}
    j = job(sent)
    pair = PREFILL.rendezvous(j, ROOM)
    assert pair == GOLDEN_PAIR
    common = chat(A, stream=True, stream_options={"include_usage": True}, max_tokens=5, n=2, odd={"kept": 1})
    golden = {**common, "rid": "r1~", **GOLDEN_PAIR}
    assert PREFILL.decode(j, {}, pair, "") == golden
    whole = {name: value for name, value in golden.items() if name != "stream_options"} | {"stream": False}
    assert PREFILL.prefill(j, {}, pair) == whole
    assert j.body["bootstrap_room"] == 1, "the job stays as it was"


def test_a_server_that_has_told_no_port_uses_its_own() -> None:
    instance = Instance("http://p1:30000", Role.PREFILL, "sglang")
    dialect = Sglang(Options(order=Order.SEQUENTIAL), instance)
    assert dialect.rendezvous(job(chat()), 1 << 9)["bootstrap_port"] is None
    instance.facts = {"bootstrap_port": 9000}
    assert dialect.rendezvous(job(chat()), 1 << 9)["bootstrap_port"] == 9000
    assert dialect.order is Order.TOGETHER, "its engines know no other"


@pytest.mark.parametrize("room", [0, 255, 256, (1 << 63) - 1])
def test_the_rooms_of_all_choices_are_free_and_fit_into_63_bits(room: int) -> None:
    first = PREFILL.rendezvous(job(chat()), room)["bootstrap_room"]
    assert first // 256 == room // 256 and first % 256 == 0 and first + 255 < 1 << 63


def test_a_combined_server_gets_the_clients_media_and_no_uuid() -> None:
    j = job(chat(A | {"uuid": "mine"}, A))
    assert PREFILL.whole(j, {}) == {**chat(A, A), "rid": "r1~"}


def test_no_rid_is_the_beginning_of_another() -> None:
    ids = ["a", "a-2", "ab", "a.b", "a:1"]
    names = [rid(one) for one in ids]
    assert not [(x, y) for x in names for y in names if x != y and y.startswith(x)]
    assert [request_id(name) for name in names] == ids
    assert request_id("theirs") == "theirs"
    assert PREFILL.abort("a") == ("/abort_request", {"rid": "a~"})


def test_a_half_is_warmed_up_without_its_peer() -> None:
    alone = {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0}
    body = {"model": "m", "prompt": "Hi", "max_tokens": 1, "temperature": 0}
    assert PREFILL.warm_up(BOTH, "m") == ("/v1/completions", body)
    assert PREFILL.warm_up(Role.PREFILL, "m") == PREFILL.warm_up(Role.DECODE, "m") == ("/v1/completions", body | alone)
    assert PREFILL.warm_up(BOTH, "") == ("/v1/completions", {k: v for k, v in body.items() if k != "model"})
    assert PREFILL.warm_up(Role.ENCODE, "m") is None
