"""The wire contract of vLLM-Ascend, body by body."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy import openai
from proxy.core import BOTH, Api, Job, Order, Role
from proxy.dialects.ascend import Ascend
from proxy.dialects.base import BadReply
from proxy.errors import BadRequest
from proxy.openai import Identity
from tests.fakes.media import chat, image, part

PUSH, PULL = Ascend(), Ascend(Order.SEQUENTIAL)
A, B = image(8, 8), image(16, 8)
URL = "http://p:8000/v1/metaserver"

# What a decode engine posts to the metaserver.
DESCRIPTOR = {
    "token_ids": [],
    "request_id": "chatcmpl-id",
    "do_remote_prefill": False,
    "do_remote_decode": True,
    "remote_block_ids": [[1, 2, 3]],
    "remote_block_size": [128],
    "remote_engine_id": "d-0",
    "remote_host": "10.0.0.3",
    "remote_port": 50001,
    "remote_tp_size": 1,
    "remote_pcp_size": 1,
    "remote_dcp_size": 1,
    "remote_cached_tokens": 0,
}
CLIENT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello"}],
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_completion_tokens": 50,
    "temperature": 0,
    "odd": {"kept": True},
}


def job(body: dict[str, Any], api: Api = Api.CHAT, trust: bool = False) -> Job:
    return openai.parse(orjson.dumps(body), api, "id", Identity(trust_client=trust))


def test_the_default_order_is_that_of_the_layerwise_connector() -> None:
    orders = [Ascend(order).order for order in (None, Order.DECODE_FIRST, Order.SEQUENTIAL, Order.TOGETHER)]
    assert orders == [Order.DECODE_FIRST, Order.DECODE_FIRST, Order.SEQUENTIAL, Order.DECODE_FIRST]


def test_an_encoder_reads_one_token_behind_the_items() -> None:
    j = job(chat(part(A), part(B), text="secret", stream=True, n=2, max_tokens=50, mm_processor_kwargs={"x": 1}, odd=3))
    assert PUSH.encode(j, j.items[1:]) == {
        "model": "tiny",
        "mm_processor_kwargs": {"x": 1},
        "odd": 3,
        "messages": [{"role": "user", "content": [part(B) | {"uuid": j.items[1].mm_hash}]}],
        "stream": False,
        "max_tokens": 1,
        "min_tokens": 1,
    }


def test_an_encoder_tells_nothing_but_that_it_is_done() -> None:
    j = job(chat(part(A)))
    assert PUSH.read_encode(j.items, {"choices": [{"index": 0, "message": {"content": ""}}]}) == {}
    with pytest.raises(BadReply, match="no choices"):
        PUSH.read_encode(j.items, {"id": "x"})
    assert PUSH.blame(j.items, "messages[0].content[0]") == "messages[0].content[1]"


def test_decode_first_names_the_metaserver() -> None:
    assert PUSH.decode(job(CLIENT), {}, None, URL) == CLIENT | {
        "kv_transfer_params": {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": URL}
    }


def test_prefill_gets_the_descriptor_verbatim() -> None:
    assert PUSH.prefill(job(CLIENT), {}, DESCRIPTOR) == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "stream": False,
        "max_completion_tokens": 1,
        "temperature": 0,
        "odd": {"kept": True},
        "max_tokens": 1,
        "min_tokens": 1,
        "kv_transfer_params": DESCRIPTOR,
    }


def test_prefill_first_asks_for_parameters_and_decode_gets_them_verbatim() -> None:
    body = PULL.prefill(job(CLIENT), {}, None)
    assert body["kv_transfer_params"] == {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }
    assert (body["max_tokens"], body["min_tokens"], body["max_completion_tokens"]) == (1, 1, 1)
    params = PULL.read_prefill({"kv_transfer_params": {"remote_block_ids": [1], "remote_port": 5}})
    assert PULL.decode(job(CLIENT), {}, params, "") == CLIENT | {"kv_transfer_params": params}
    with pytest.raises(BadReply, match="no kv_transfer_params"):
        PULL.read_prefill({"kv_transfer_params": None})


def test_every_stage_gets_the_media_under_our_names() -> None:
    body = chat(part(A) | {"uuid": "../../etc"}, part(B))
    j = job(body, trust=False)
    named = [part(A) | {"uuid": j.items[0].mm_hash}, part(B) | {"uuid": j.items[1].mm_hash}]
    shaped = [
        PUSH.prefill(j, {}, DESCRIPTOR),
        PUSH.decode(j, {}, None, URL),
        PULL.prefill(j, {}, None),
        PULL.decode(j, {}, {}, ""),
        PUSH.whole(j, {}),
    ]
    for found in shaped:
        assert found["messages"][0]["content"][1:] == named
    text = job(CLIENT)
    assert PUSH.whole(text, {}) is text.body


def test_each_prompt_and_each_choice_is_prefilled() -> None:
    assert PUSH.prefills(job(CLIENT)) == 1
    assert PUSH.prefills(job(CLIENT | {"n": 3})) == 3
    assert PUSH.prefills(job({"prompt": ["a", "b"], "n": 2}, Api.COMPLETIONS)) == 4
    assert PUSH.prefills(job({"prompt": [1, 2, 3]}, Api.COMPLETIONS)) == 1


@pytest.mark.parametrize(
    ("sequence", "prompt"),
    [("cmpl-id-0", "a"), ("cmpl-id-1", "b"), ("1_cmpl-id-1", "b"), ("cmpl-id-1-00000000", "b")],
)
def test_prefill_gets_the_prompt_of_its_sequence(sequence: str, prompt: str) -> None:
    j = job({"prompt": ["a", "b"], "n": 2}, Api.COMPLETIONS)
    body = PUSH.prefill(j, {}, DESCRIPTOR | {"request_id": sequence})
    assert (body["prompt"], body["n"]) == (prompt, 1)


def test_a_sequence_of_no_prompt_is_refused() -> None:
    j = job({"prompt": ["a", "b"]}, Api.COMPLETIONS)
    with pytest.raises(BadRequest, match="no prompt 2"):
        PUSH.prefill(j, {}, DESCRIPTOR | {"request_id": "cmpl-id-2"})
    with pytest.raises(BadRequest, match="one by one"):
        PULL.prefill(j, {}, None)


@pytest.mark.parametrize("dialect", [PUSH, PULL])
def test_a_chat_goes_on_from_its_tokens_in_both_engines(dialect: Ascend) -> None:
    j = job(CLIENT)
    recorded = dialect.recorded(j)
    assert recorded == CLIENT | {"return_token_ids": True}
    body = dialect.continued(j, [1, 2], [7, 8])
    assert body is not None
    assert (body["messages"], body["max_completion_tokens"]) == (CLIENT["messages"], 48)
    ids = {"_vllm_ascend_recompute_token_ids": [1, 2, 7, 8], "prompt_token_ids": [1, 2, 7, 8]}
    again = Job("id-2", Api.CHAT, body, (), 0, 0, True)
    if dialect is PUSH:
        assert dialect.prefill(again, {}, DESCRIPTOR)["kv_transfer_params"] == DESCRIPTOR | ids
        assert dialect.decode(again, {}, None, URL)["kv_transfer_params"] == {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "metaserver": URL,
            **ids,
        }
    else:
        assert ids.items() <= dialect.prefill(again, {}, None)["kv_transfer_params"].items()
        assert dialect.decode(again, {}, {"x": 1}, "")["kv_transfer_params"] == {"x": 1, **ids}
    assert "return_token_ids" not in dialect.prefill(again, {}, DESCRIPTOR)


def test_a_completion_goes_on_from_a_prompt_of_tokens() -> None:
    j = job({"prompt": "hello", "min_tokens": 3}, Api.COMPLETIONS)
    assert PUSH.continued(j, [1, 2], [7, 8]) == {
        "prompt": [1, 2, 7, 8],
        "min_tokens": 1,
        "return_token_ids": True,
        "max_tokens": 14,
    }


def test_what_is_at_its_limit_or_has_no_known_prompt_does_not_go_on() -> None:
    assert PUSH.continued(job(CLIENT | {"max_completion_tokens": 2}), [1], [7, 8]) is None
    assert PUSH.continued(job(CLIENT), [], [7, 8]) is None
    unbounded = {name: value for name, value in CLIENT.items() if name != "max_completion_tokens"}
    body = PUSH.continued(job(unbounded), [1], [7, 8])
    assert body is not None and "max_tokens" not in body


def test_language_engines_are_warmed_up_by_a_request_of_their_own() -> None:
    for role in (Role.PREFILL, Role.DECODE, BOTH):
        call = PUSH.warm_up(role, "tiny")
        assert call == ("/v1/completions", {"model": "tiny", "prompt": "hello", "max_tokens": 1})
    assert PUSH.warm_up(Role.ENCODE, "tiny") is None
