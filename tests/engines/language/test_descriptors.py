from __future__ import annotations

from typing import Any

import pytest

from engines.errors import BadRequest
from engines.language.descriptors import Ask, Fetch, Keep, Publish, Push, Self, asking, published, read

ME = Self("abcd", "10.0.0.1", 4123)
WHERE = {"key": "k"}
LAYOUT = {"block_size": 16}


def test_what_decode_asks_is_what_prefill_reads() -> None:
    descriptor = asking(ME, "chatcmpl-1", [4, 5], 16, {"ticket": "t"})
    assert read(descriptor, "prefill") == Push({"ticket": "t"}, (4, 5))
    # The names are vLLM-Ascend's: a proxy for its fleets must find each of them.
    assert descriptor == {
        "token_ids": [],
        "request_id": "chatcmpl-1",
        "do_remote_prefill": False,
        "do_remote_decode": True,
        "remote_block_ids": [[4, 5]],
        "remote_block_size": [16],
        "remote_engine_id": "abcd",
        "remote_host": "10.0.0.1",
        "remote_port": 4123,
        "remote_tp_size": 1,
        "remote_pcp_size": 1,
        "remote_dcp_size": 1,
        "remote_cached_tokens": 0,
        "offer": {"ticket": "t"},
    }


def test_what_prefill_publishes_is_what_decode_reads() -> None:
    params = published(ME, "chatcmpl-1", [4, 5], 20, WHERE, LAYOUT)
    assert read(params, "decode") == Fetch(WHERE, LAYOUT, 20)
    # The names are vLLM's NixlConnector's.
    assert {key: params[key] for key in params if key not in ("where", "layout")} == {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [[4, 5]],
        "remote_engine_id": "abcd",
        "remote_request_id": "chatcmpl-1",
        "remote_host": "10.0.0.1",
        "remote_port": 4123,
        "remote_num_tokens": 20,
        "tp_size": 1,
    }


def test_the_other_plans() -> None:
    asked = dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
    assert read({"do_remote_decode": True, "do_remote_prefill": False, **asked}, "prefill") == Publish()
    assert read({"do_remote_prefill": True, "metaserver": "http://p/v1/metaserver"}, "decode") == Ask(
        "http://p/v1/metaserver"
    )
    assert read(None, "both") == Keep()
    assert read({"do_remote_prefill": False, "do_remote_decode": False}, "both") == Keep()


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ([], "kv_transfer_params"),
        ({"do_remote_prefill": True, "do_remote_decode": True}, "kv_transfer_params"),
        ({"do_remote_prefill": True}, "kv_transfer_params"),
        ({"do_remote_prefill": True, "metaserver": "file:///etc/passwd"}, "kv_transfer_params.metaserver"),
        ({"do_remote_decode": True, "offer": "x"}, "kv_transfer_params.offer"),
        ({"do_remote_decode": True, "offer": {}}, "kv_transfer_params.remote_block_ids"),
        ({"do_remote_decode": True, "offer": {}, "remote_block_ids": [["x"]]}, "kv_transfer_params.remote_block_ids"),
    ],
)
def test_nonsense_is_refused_with_its_path(params: Any, param: str) -> None:
    with pytest.raises(BadRequest) as raised:
        read(params, "both")
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("role", "params"),
    [
        ("prefill", None),
        ("decode", None),
        ("prefill", {"do_remote_prefill": True, "metaserver": "http://p"}),
        ("decode", {"do_remote_decode": True}),
    ],
)
def test_a_role_refuses_other_plans_and_says_what_it_serves(role: str, params: Any) -> None:
    with pytest.raises(BadRequest, match=f"role is {role}: it serves requests whose") as raised:
        read(params, role)
    assert raised.value.code == "role"
