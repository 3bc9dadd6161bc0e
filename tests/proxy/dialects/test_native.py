"""The native wire contract, body by body."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy import openai
from proxy.core import BOTH, Api, Handle, Job, Order, Role
from proxy.dialects.base import BadReply
from proxy.dialects.native import Native
from proxy.errors import BadRequest
from proxy.openai import Identity
from tests.fakes.media import chat, image, part

PUSH, PULL = Native(Order.DECODE_FIRST), Native(Order.SEQUENTIAL)
A, B = image(8, 8), image(16, 8)


def job(body: dict[str, Any], api: Api = Api.CHAT) -> Job:
    return openai.parse(orjson.dumps(body), api, "id", Identity())


def entry(*indices: int, grid: int = 2) -> dict[str, Any]:
    return {
        "modality": "image",
        "item_indices": list(indices),
        "metadata": {"image_grid_thw": [1, grid, 2]},
        "where": 1,
    }


def handle(mm_hash: str, grid: int) -> Handle:
    found = entry(0, grid=grid)
    return Handle(mm_hash, "image", found["metadata"], found)


def test_an_encoder_gets_the_items_and_what_shapes_them_and_nothing_else() -> None:
    j = job(chat(part(A), part(B), text="secret", stream=True, max_tokens=5, mm_processor_kwargs={"max_pixels": 9}))
    body = PUSH.encode(j, j.items[1:])
    assert body == {
        "model": "tiny",
        "mm_processor_kwargs": {"max_pixels": 9},
        "messages": [{"role": "user", "content": [part(B) | {"uuid": j.items[1].mm_hash}]}],
        "stream": False,
    }


def test_an_encoders_entries_find_their_items() -> None:
    j = job(chat(part(A), part(B), part(image(9, 9))))
    reply = {"ec_transfer_params": {"h1": entry(0, 2), "h2": entry(1)}}
    found = PUSH.read_encode(j.items, reply)
    assert [found[index].mm_hash for index in (0, 1, 2)] == ["h1", "h2", "h1"]
    assert found[0].entry["where"] == 1


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ({}, "no ec_transfer_params"),
        ({"ec_transfer_params": None}, "no ec_transfer_params"),
        ({"ec_transfer_params": {"h": entry(0)}}, r"nothing of messages\[0\].content\[2\]"),
        ({"ec_transfer_params": {"h": {"item_indices": [0, 1]}}}, "no metadata"),
        ({"ec_transfer_params": {"h": entry(0, 7)}}, "nothing of"),
    ],
)
def test_a_reply_without_an_item_is_named(reply: dict[str, Any], says: str) -> None:
    j = job(chat(part(A), part(B)))
    with pytest.raises(BadReply, match=says):
        PUSH.read_encode(j.items, reply)


def test_blame_is_told_in_the_clients_own_positions() -> None:
    j = job(chat(part(A), part(B)))
    assert PUSH.blame(j.items[1:], "messages[0].content[0]") == "messages[0].content[2]"
    assert PUSH.blame(j.items, "messages[0].content[9]") == "messages[0].content[9]"
    assert PUSH.blame(j.items, "model") == "model"
    assert PUSH.blame(j.items, None) is None


def test_media_become_grids_and_only_what_holds_them_is_copied() -> None:
    body = chat(part(A), part(A) | {"uuid": "mine"})
    body["messages"].insert(0, {"role": "system", "content": "plain"})
    j = job(body)
    handles = {item.index: handle("h", 4) for item in j.items}
    whole = PUSH.whole(j, handles)
    embeds = {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 4, 2]}, "uuid": "h"}
    assert whole["messages"][1]["content"][1:] == [embeds, embeds]
    assert whole["messages"][0] is j.body["messages"][0]
    assert whole["ec_transfer_params"] == {"h": handles[0].entry}
    assert j.body["messages"] == body["messages"]


CLIENT = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 50,
    "max_completion_tokens": 60,
    "min_tokens": 3,
    "n": 2,
}


def test_prefill_in_pull_is_asked_for_parameters() -> None:
    j = job(chat(part(A), **CLIENT))
    body = PULL.prefill(j, {0: handle("h", 4)}, None)
    assert body["kv_transfer_params"] == {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }
    assert (body["stream"], body["max_tokens"], body["max_completion_tokens"], body["n"]) == (False, 1, 1, 1)
    assert "stream_options" not in body and "min_tokens" not in body
    assert list(body["ec_transfer_params"]) == ["h"]


def test_prefill_in_push_gets_the_descriptor_verbatim() -> None:
    descriptor = {"remote_block_ids": [[1]], "odd": {"kept": True}}
    body = PUSH.prefill(job(chat(max_tokens=50)), {}, descriptor)
    assert body["kv_transfer_params"] is descriptor
    assert (body["stream"], body["max_tokens"], body["min_tokens"]) == (False, 1, 1)
    assert "max_completion_tokens" not in body and "n" not in body and "ec_transfer_params" not in body


def test_decode_keeps_what_the_client_asked_for() -> None:
    j = job(chat(part(A), **CLIENT))
    pull = PULL.decode(j, {0: handle("h", 4)}, {"where": 1}, "")
    assert pull["kv_transfer_params"] == {"where": 1}
    assert {name: pull[name] for name in CLIENT} == CLIENT
    assert "ec_transfer_params" not in pull
    push = PUSH.decode(j, {0: handle("h", 4)}, None, "http://m")
    asked = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": "http://m"}
    assert push["kv_transfer_params"] == asked


def test_a_trusted_clients_handles_go_to_whoever_prefills() -> None:
    body = chat(part(A), ec_transfer_params={"theirs": {"x": 1}})
    j = openai.parse(orjson.dumps(body), Api.CHAT, "id", Identity(trust_client=True))
    mine = {0: handle("h", 4)}
    for shaped in (PUSH.prefill(j, mine, {}), PUSH.whole(j, mine)):
        assert shaped["ec_transfer_params"] == {"theirs": {"x": 1}, "h": mine[0].entry}
    assert "ec_transfer_params" not in PUSH.decode(j, mine, None, "")


def test_prefill_parameters_are_read_or_missed() -> None:
    assert PULL.read_prefill({"kv_transfer_params": {"a": 1}}) == {"a": 1}
    with pytest.raises(BadReply, match="no kv_transfer_params"):
        PULL.read_prefill({"kv_transfer_params": None})


@pytest.mark.parametrize("prompt", [["a", "b"], [[1, 2], [3]]])
def test_several_prompts_need_a_combined_engine(prompt: list[Any]) -> None:
    j = job({"prompt": prompt}, Api.COMPLETIONS)
    for shape in (lambda: PUSH.decode(j, {}, None, ""), lambda: PULL.prefill(j, {}, None)):
        with pytest.raises(BadRequest, match="one by one"):
            shape()
    assert PUSH.whole(j, {})["prompt"] == prompt
    assert PUSH.decode(job({"prompt": [1, 2]}, Api.COMPLETIONS), {}, None, "")["prompt"] == [1, 2]


def test_who_serves_alone_is_warmed_up() -> None:
    call = PUSH.warm_up(BOTH, "tiny")
    assert call == ("/v1/completions", {"model": "tiny", "prompt": "hello", "max_tokens": 1, "temperature": 0})
    assert PUSH.warm_up(Role.PREFILL, "tiny") is PUSH.warm_up(Role.DECODE, "tiny") is None
    path, body = PUSH.warm_up(Role.ENCODE, "") or ("", {})
    (item,) = openai.parse(orjson.dumps({"model": "m", **body}), Api(path), "id", Identity()).items
    assert item.modality == "image" and "model" not in body
