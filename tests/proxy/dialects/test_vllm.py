"""vLLM's protocol, body by body: as the releases since 0.32 want it, and as those before do."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy import openai
from proxy.core import Api, Handle, Instance, Job, Order, Role
from proxy.dialects.base import BadReply, Media, Options
from proxy.dialects.vllm import Vllm
from proxy.errors import BadRequest
from proxy.openai import Identity
from tests.fakes.media import chat, image, part

A, B = image(8, 8), image(16, 8)
VIDEO = {"type": "video_url", "video_url": {"url": "http://media/v.mp4"}}
SOUND = {"type": "audio_url", "audio_url": {"url": "http://media/a.wav"}}
SPEECH = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
REMOTE = {"type": "image_url", "image_url": {"url": "http://media/i.png"}}
CLIENT = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 50,
    "max_completion_tokens": 60,
    "min_tokens": 3,
    "n": 2,
    "odd": {"kept": True},
}
ASK = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def vllm(version: str | None = "0.32.0", media: Media = Media.AUTO, order: Order | None = None, **facts: Any) -> Vllm:
    known = facts if version is None else {"version": version, **facts}
    return Vllm(Options(order, media), Instance("http://p:8001", Role.PREFILL, "vllm", facts=known))


def job(body: dict[str, Any], api: Api = Api.CHAT, **identity: Any) -> Job:
    return openai.parse(orjson.dumps(body), api, "id", Identity(**identity))


def handle(j: Job, index: int = 0, mm_hash: str | None = None, **own: Any) -> Handle:
    item = j.items[index]
    metadata = {f"{item.modality}_grid_thw": [1, 4, 2]}
    key = mm_hash or item.mm_hash or "of-its-bytes"
    return Handle(key, item.modality, metadata, {"item_indices": [index], "metadata": metadata, **own})


def content(body: Any) -> list[Any]:
    parts: list[Any] = body["messages"][-1]["content"]
    return parts


# ---- encode


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1", "1.0", "0.32.0+cpu", None])
def test_encode_takes_media_under_our_hashes_and_all_that_shapes_them(version: str | None) -> None:
    j = job(chat(part(A), part(B), text="secret", mm_processor_kwargs={"max_pixels": 9}, **CLIENT))
    first, second = (item.mm_hash for item in j.items)
    assert vllm(version).encode(j, j.items) == {
        "model": "tiny",
        "messages": [
            {
                "role": "user",
                "content": [part(A) | {"uuid": first}, part(B) | {"uuid": second}],
            }
        ],
        "mm_processor_kwargs": {"max_pixels": 9},
        "odd": {"kept": True},
        "stream": False,
    }


@pytest.mark.parametrize("version", ["0.12.0", "0.28.0", "0.31.9"])
def test_encode_of_old_asks_for_a_token_and_leaves_hashing_to_the_engine(version: str) -> None:
    j = job(chat(part(A) | {"uuid": "../mine"}, mm_processor_kwargs={"max_pixels": 9}))
    assert vllm(version).encode(j, j.items) == {
        "model": "tiny",
        "messages": [{"role": "user", "content": [part(A)]}],
        "mm_processor_kwargs": {"max_pixels": 9},
        "stream": False,
        "max_tokens": 1,
    }


def test_images_share_a_call_and_every_other_item_has_its_own() -> None:
    j = job(chat(part(A), VIDEO, part(B), SOUND, SPEECH))
    batches = vllm().batches(j.items)
    assert [[item.index for item in batch] for batch in batches] == [[0, 2], [1], [3], [4]]
    assert [item.modality for item in j.items] == ["image", "video", "image", "audio", "audio"]
    assert [len(batch) for batch in vllm().batches(j.items[1:2])] == [1]


def test_entries_find_their_items_by_position_whatever_their_hash() -> None:
    j = job(chat(part(A), part(B), part(A)))
    grid = {"image_grid_thw": [1, 6, 8]}
    entries = {"x": {"item_indices": [0, 2], "metadata": grid}, "y": {"item_indices": [1], "metadata": grid}}
    found = vllm().read_encode(j.items, {"ec_transfer_params": entries})
    assert {index: (h.mm_hash, h.modality) for index, h in found.items()} == {
        0: ("x", "image"),
        1: ("y", "image"),
        2: ("x", "image"),
    }


def test_an_encoder_that_reports_nothing_is_told_from_one_that_never_does() -> None:
    j = job(chat(part(A)))
    silent = {"choices": [{"index": 0}], "ec_transfer_params": None}
    assert vllm("0.12.0").read_encode(j.items, silent) == {}
    assert vllm(None).read_encode(j.items, silent) == {}
    with pytest.raises(BadReply, match="--ec-transfer-config"):
        vllm("0.32.0").read_encode(j.items, silent)
    with pytest.raises(BadReply, match="no choices"):
        vllm("0.12.0").read_encode(j.items, {"detail": "?"})


# ---- who prefills


def test_metadata_go_alone_where_a_missing_embedding_does_no_harm() -> None:
    j = job(chat(part(A), part(B)))
    sure, unsure = handle(j, 0, where={"transport": "shm"}), handle(j, 1)
    body = vllm().whole(j, {0: sure, 1: unsure})
    assert content(body)[1:] == [
        {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 4, 2]}, "uuid": j.items[0].mm_hash},
        part(B) | {"uuid": j.items[1].mm_hash},
    ]
    assert body["ec_transfer_params"] == {sure.mm_hash: sure.entry, unsure.mm_hash: unsure.entry}
    assert content(job(chat(part(A), part(B))).body) == content(j.body), "the job stays as it was"


@pytest.mark.parametrize(
    ("media", "own", "kind"),
    [
        (Media.AUTO, {}, "image_url"),
        (Media.AUTO, {"peer_host": "h", "peer_port": 1}, "image_url"),
        (Media.AUTO, {"transfer_id": "t"}, "image_embeds"),
        (Media.AUTO, {"where": {"transport": "shm"}}, "image_embeds"),
        (Media.AUTO, {"where": {"transport": "storage"}}, "image_url"),
        (Media.ALWAYS, {"where": {}}, "image_url"),
        (Media.NEVER, {}, "image_embeds"),
    ],
)
def test_who_gets_media_can_be_said(media: Media, own: dict[str, Any], kind: str) -> None:
    j = job(chat(part(A)))
    assert content(vllm(media=media).whole(j, {0: handle(j, **own)}))[1]["type"] == kind


def test_a_hash_that_the_engine_would_hash_again_never_stands_alone() -> None:
    factors = {"mm_processor_kwargs": {"max_pixels": 9}}
    ours, remote = job(chat(part(A), **factors)), job(chat(REMOTE, **factors))
    rehashed = handle(ours, mm_hash="of-uuid-and-factors", transfer_id="t")
    assert content(vllm().whole(ours, {0: rehashed}))[1] == {
        "type": "image_embeds",
        "image_embeds": {"image_grid_thw": [1, 4, 2]},
        "uuid": ours.items[0].mm_hash,
    }
    as_we_named_it = handle(ours, where={})
    assert content(vllm().whole(ours, {0: as_we_named_it}))[1]["type"] == "image_url"
    assert content(vllm().whole(remote, {0: handle(remote, transfer_id="t")}))[1] == REMOTE


def test_a_url_goes_by_the_hash_that_its_encoder_found() -> None:
    j = job(chat(REMOTE | {"uuid": "mine"}))
    assert content(vllm().whole(j, {0: handle(j, transfer_id="t")}))[1]["uuid"] == "of-its-bytes"
    assert content(vllm().whole(j, {}))[1] == REMOTE, "the client's uuid goes nowhere"


def test_a_video_with_sound_is_two_items_and_never_metadata() -> None:
    j = job(chat(VIDEO, mm_processor_kwargs={"use_audio_in_video": True}))
    common = {"item_indices": [0], "transfer_id": "t"}
    entries = {
        "v": {"modality": "video", "metadata": {"video_grid_thw": [2, 4, 4]}, **common},
        "a": {"modality": "audio", "metadata": {"audio_num_tokens": 7}, **common},
    }
    found = vllm().read_encode(j.items, {"ec_transfer_params": entries})
    assert found[0].mm_hash == "v"
    assert content(vllm().whole(j, found))[1] == VIDEO
    assert content(vllm().decode(j, found, {"remote_engine_id": "e"}, ""))[1] == VIDEO


def test_prefill_is_asked_for_its_kv_and_says_one_token() -> None:
    j = job(chat(part(A), **CLIENT))
    body = vllm().prefill(j, {0: handle(j)}, None)
    assert body["kv_transfer_params"] == ASK
    assert (body["stream"], body["max_tokens"], body["max_completion_tokens"], body["n"]) == (False, 1, 1, 1)
    assert "stream_options" not in body and "min_tokens" not in body
    assert body["odd"] == {"kept": True} and list(body["ec_transfer_params"]) == [j.items[0].mm_hash]


@pytest.mark.parametrize("old", ["0.12.0", "0.30.0"])
def test_old_engines_get_the_clients_own_media_everywhere(old: str) -> None:
    j = job(chat(part(A) | {"uuid": "x"}, ec_transfer_params={"theirs": 1}, **CLIENT), trust_client=True)
    dialect, told = vllm(old), {"remote_engine_id": "e"}
    for body in (dialect.whole(j, {}), dialect.prefill(j, {}, None), dialect.decode(j, {}, told, "")):
        assert content(body)[1] == part(A)
        assert "ec_transfer_params" not in body


def test_text_goes_on_as_it_came() -> None:
    j = job(chat())
    assert vllm().whole(j, {}) is j.body


# ---- decode


def test_decode_gets_the_parameters_verbatim_and_no_handles() -> None:
    j = job(chat(part(A), **CLIENT))
    told = vllm().read_prefill({"choices": [], "kv_transfer_params": {"remote_engine_id": "e", "new_in_0.33": 1}})
    body = vllm().decode(j, {0: handle(j)}, told, "")
    assert body["kv_transfer_params"] == {"remote_engine_id": "e", "new_in_0.33": 1}
    assert content(body)[1]["type"] == "image_embeds", "all KV is there: nothing is encoded"
    assert "ec_transfer_params" not in body
    assert {name: body[name] for name in CLIENT} == CLIENT
    assert content(vllm(media=Media.ALWAYS).decode(j, {0: handle(j)}, told, ""))[1]["type"] == "image_url"


@pytest.mark.parametrize("params", [None, {}])
def test_decode_without_parameters_gets_the_media(params: Any) -> None:
    j = job(chat(part(A)))
    told = vllm().read_prefill({"choices": [], "kv_transfer_params": params})
    body = vllm().decode(j, {0: handle(j, where={})}, told, "")
    assert content(body)[1]["type"] == "image_url" and "kv_transfer_params" not in body
    with pytest.raises(BadReply, match="no choices"):
        vllm().read_prefill({})


def test_several_prompts_need_a_combined_engine() -> None:
    j = job({"model": "tiny", "prompt": ["a", "b"]}, Api.COMPLETIONS)
    for shape in (lambda: vllm().prefill(j, {}, None), lambda: vllm().decode(j, {}, {}, "")):
        with pytest.raises(BadRequest, match="one by one"):
            shape()
    assert vllm().whole(j, {}) is j.body


# ---- both at once


MOONCAKE: dict[str, Any] = {"bootstrap_port": 8998, "bootstrap": "http://p:8998", "engine_ids": {"0": "e0"}}


@pytest.mark.parametrize(
    ("order", "facts", "expected"),
    [
        (None, {}, Order.SEQUENTIAL),
        (Order.SEQUENTIAL, {}, Order.SEQUENTIAL),
        (Order.TOGETHER, {}, Order.TOGETHER),
        (Order.DECODE_FIRST, {}, Order.TOGETHER),
        (None, {"bootstrap_port": 8998}, Order.TOGETHER),
    ],
)
def test_the_order_is_that_of_the_connector(order: Order | None, facts: dict[str, Any], expected: Order) -> None:
    assert vllm(order=order, **facts).order is expected


def test_both_get_one_transfer_id_and_decode_the_engine_it_comes_from() -> None:
    dialect, j = vllm(**MOONCAKE), job(chat(part(A), **CLIENT))
    met = dialect.rendezvous(j, 255)
    prefill, decode = dialect.prefill(j, {}, met), dialect.decode(j, {0: handle(j)}, met, "")
    transfer_id = "xfer-id-00000000000000ff"
    assert prefill["kv_transfer_params"] == {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "transfer_id": transfer_id,
    }
    assert (prefill["max_tokens"], prefill["min_tokens"]) == (1, 1), "an end at the first token would free its KV"
    assert decode["kv_transfer_params"] == {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "transfer_id": transfer_id,
        "remote_bootstrap_addr": "http://p:8998",
        "remote_engine_id": "e0",
    }
    assert dialect.headers(met) == {} == dialect.headers(None)
    assert dialect.rendezvous(j, 254) != met


def test_a_data_parallel_rank_is_chosen_and_named() -> None:
    dialect, j = vllm(**MOONCAKE | {"engine_ids": {"0": "e0", "1": "e1", "10": "e10"}}), job(chat())
    seen = {}
    for room in range(3):
        met = dialect.rendezvous(j, room)
        seen[dialect.headers(met)["x-data-parallel-rank"]] = dialect.decode(j, {}, met, "")["kv_transfer_params"]
    assert {rank: told["remote_engine_id"] for rank, told in seen.items()} == {"0": "e0", "1": "e1", "10": "e10"}
    assert all("rank" not in told for told in seen.values())


def test_encoders_that_push_are_told_where_to_and_prefill_under_which_names() -> None:
    j = job(chat(part(A), part(B), part(A)))
    dialect = vllm(ec_port=14579)
    told = dialect.expects(j.items[:2], 255)["ec_transfer_params"]
    assert told == {
        "consumer_zmq": "tcp://p:14579",
        "ec_items": [{"transfer_id": "00000000000000ff0000"}, {"transfer_id": "00000000000000ff0001"}],
    }
    assert vllm().expects(j.items, 255) == {}
    one, two = (handle(j, index, **told["ec_items"][index]) for index in (0, 1))
    sent = dialect.whole(j, {0: one, 1: two, 2: one})["ec_transfer_params"]
    names = [{"mm_hash": h.mm_hash, "transfer_id": h.entry["transfer_id"]} for h in (one, two)]
    assert sent == {one.mm_hash: one.entry, two.mm_hash: two.entry, "ec_items": names}


def test_nothing_replaces_metadata_where_engines_take_no_media() -> None:
    assert vllm().media_instead and not vllm(media=Media.NEVER).media_instead


# ---- before it serves


@pytest.mark.parametrize("role", [Role.ENCODE, Role.PREFILL, Role.DECODE, Role.PREFILL | Role.DECODE])
def test_every_engine_warms_up_with_a_text(role: Role) -> None:
    call = vllm().warm_up(role, "m")
    assert call is not None
    path, body = call
    assert path == ("/v1/chat/completions" if role is Role.ENCODE else "/v1/completions")
    assert body["model"] == "m" and body["max_tokens"] == 1 and "kv_transfer_params" not in body
    unnamed = vllm().warm_up(role, "")
    assert unnamed is not None and "model" not in unnamed[1], "the engine has one, and knows it"


@pytest.mark.parametrize("params", [-1, "x", [1], True])
def test_parameters_that_are_no_object_are_no_reply(params: Any) -> None:
    with pytest.raises(BadReply, match="are no object"):
        vllm().read_prefill({"choices": [], "kv_transfer_params": params})
