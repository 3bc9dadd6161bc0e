"""Who an engine says that it is, in the words that each family was seen to use."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy.core import BOTH, Instance, Role
from proxy.joining import detect
from proxy.joining.detect import Found
from proxy.media.vision import FAMILIES, Vision
from proxy.upstream import Timeouts, Upstream

VLLM_CARDS = {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm", "max_model_len": 9}]}
SGLANG_CARDS = {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "sglang"}]}


def asking(answers: dict[str, Any]) -> detect.Ask:
    async def ask(path: str) -> Any:
        return answers.get(path)

    return ask


OURS = {"engine": "triptych", "version": "1", "model": "m"}
SGLANG = {"version": "0.5.23", "disaggregation_mode": "null", "served_model_name": "m"}
OLD_SGLANG = {
    "version": "0.5.10",
    "disaggregation_mode": "prefill",
    "disaggregation_bootstrap_port": 8998,
    "language_only": True,
    "model_path": "m",
}


@pytest.mark.parametrize(
    ("answers", "family", "role", "facts"),
    [
        ({"/info": OURS | {"role": "decode"}}, "native", Role.DECODE, {"version": "1"}),
        (
            {"/info": OURS | {"role": "prefill", "num_blocks": 512, "block_size": 16}},
            "native",
            Role.PREFILL,
            {"version": "1", "kv_tokens": 8192},
        ),
        ({"/info": OURS | {"role": "both", "encodes": True}}, "native", BOTH, {"version": "1", "encodes": True}),
        ({"/info": OURS | {"role": "chef"}}, "native", None, {"version": "1"}),
        ({"/v1/models": VLLM_CARDS, "/version": {"version": "0.33.0"}}, "vllm", None, {"version": "0.33.0"}),
        ({"/v1/models": VLLM_CARDS}, "vllm", None, {}),
        (
            {"/v1/models": SGLANG_CARDS, "/server_info": SGLANG | {"max_total_num_tokens": 4096}},
            "sglang",
            BOTH,
            {"version": "0.5.23", "language_only": False, "kv_tokens": 4096},
        ),
        (
            {"/get_server_info": OLD_SGLANG},
            "sglang",
            Role.PREFILL,
            {"version": "0.5.10", "language_only": True, "bootstrap_port": 8998},
        ),
    ],
    ids=[
        "native",
        "native with KV",
        "native that encodes",
        "native of no role",
        "vllm",
        "vllm of no version",
        "sglang",
        "sglang prefill",
    ],
)
async def test_each_family_is_known_by_its_own_words(
    answers: dict[str, Any], family: str, role: Role | None, facts: dict[str, Any]
) -> None:
    found = await detect.detect(asking(answers))
    assert found is not None
    assert (found.family, found.role, found.model, found.facts) == (family, role, "m", facts)
    assert "GET /" in found.how
    named = await detect.detect(asking(answers), family)
    assert named == found


@pytest.mark.parametrize(
    ("paths", "version"),
    [
        (["/encode", "/scheduler_receive_url"], "before 0.5.19"),
        (["/encode", "/scheduler_receive_url", "/scheduler_receive_meta_data"], "0.5.19 or later"),
    ],
)
async def test_an_sglang_encoder_is_known_by_what_can_be_called(paths: list[str], version: str) -> None:
    found = await detect.detect(asking({"/openapi.json": {"paths": {path: {} for path in paths}}}))
    assert found is not None and "/openapi.json" in found.how
    assert (found.family, found.role, found.facts) == ("sglang", Role.ENCODE, {"version": version})


async def test_how_a_language_server_gets_its_embeddings_is_kept() -> None:
    answers = {"/server_info": SGLANG | {"language_only": True, "encoder_transfer_backend": "mooncake"}}
    found = await detect.detect(asking(answers))
    assert found is not None and found.facts["encoder_transfer_backend"] == "mooncake"


@pytest.mark.parametrize(
    "answers",
    [
        {},
        {"/openapi.json": {"paths": {"/encode": {}}}},
        {"/openapi.json": []},
        {"/info": {"engine": "another"}, "/v1/models": {"data": [{"id": "m", "owned_by": "me"}]}},
        {"/info": [], "/v1/models": [], "/version": {"version": "9", "os": "x"}, "/server_info": {"up": True}},
        {"/v1/models": {"data": "vllm"}},
        {"/v1/models": {"data": [None, {"owned_by": "vllm"}]}},
    ],
)
async def test_a_stranger_is_nobody(answers: dict[str, Any]) -> None:
    assert await detect.detect(asking(answers)) is None


@pytest.mark.parametrize(
    ("version", "plugged"),
    [("0.26.0+empty", True), ("0.27.0rc1+g0123.empty", True), ("0.33.0", False), ("0.32.0+cpu", False), (None, False)],
)
async def test_vllm_under_a_plugin_is_seen(version: str | None, plugged: bool) -> None:
    found = await detect.detect(asking({"/v1/models": VLLM_CARDS, "/version": {"version": version}}))
    assert found is not None and detect.plugged(found) is plugged


async def test_an_engine_named_ascend_is_asked_what_vllm_is() -> None:
    found = await detect.detect(asking({"/v1/models": VLLM_CARDS, "/version": {"version": "0.26.0"}}), "ascend")
    assert found is not None and found.model == "m" and found.facts == {"version": "0.26.0"}
    assert not isinstance(await detect.detect(asking({}), "ascend"), Found)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"0": {"engine_id": "e0"}, "1": {"engine_id": "e1"}}, {"0": "e0", "1": "e1"}),
        ({"0": {}, "x": {"engine_id": "e"}, "2": None}, {}),
        (None, {}),
    ],
)
async def test_a_bootstrap_server_tells_engine_ids_by_rank(answer: Any, expected: dict[str, str]) -> None:
    assert await detect.engine_ids(asking({"/query": answer})) == expected


@pytest.mark.parametrize(
    ("url", "facts", "expected"),
    [
        ("http://p:8001", {}, "http://p:8998"),
        ("https://p:8001/base", {"bootstrap_port": 9000}, "http://p:9000"),
        ("http://[::1]:8001", {}, "http://[::1]:8998"),
    ],
)
def test_a_bootstrap_server_is_on_its_engines_host(url: str, facts: dict[str, Any], expected: str) -> None:
    assert detect.bootstrap_url(Instance(url, Role.PREFILL, "vllm", facts=facts), 8998) == expected


async def test_one_of_our_encoders_tells_how_it_cuts_media() -> None:
    said = {"model_type": "qwen3_vl", "vision_config": {}, "image_processor": {"merge_size": 2}, "itemsize": 2}
    held = {"capacity": 10 * FAMILIES["qwen3_vl"].embedding_bytes}
    found = await detect.detect(asking({"/info": OURS | {"role": "encode", "vision": said, "cache": held}}))
    assert found is not None and Vision(**found.facts["vision"]) == FAMILIES["qwen3_vl"]
    assert found.facts["cache_tokens"] == 10
    assert orjson.loads(orjson.dumps(found.facts)) == found.facts, "other workers read it"


async def test_little_is_kept_of_what_is_said_at_length() -> None:
    said = OURS | {"role": "decode", "model": "m" * 10_000, "version": [["1"] * 1000], "num_blocks": 1 << 63}
    found = await detect.detect(asking({"/info": said | {"block_size": 1 << 63}}))
    assert found is not None and len(found.model) == len(found.facts["version"]) == 300
    assert found.facts["kv_tokens"] == 1 << 53 and orjson.dumps(found.facts)
    labelled = await detect.detect(asking({"/info": OURS | {"role": "r" * 10_000}}))
    assert labelled is not None and len(labelled.how) == 300


@pytest.mark.parametrize("answer", [b"no JSON", b"[" * 300 + b"]" * 300])
async def test_what_nobody_could_be_told_is_no_answer(answer: bytes) -> None:
    class Engine(Upstream):
        async def get(self, instance: Instance, path: str, seconds: float) -> tuple[int, bytes]:
            return 200, answer

    engine = Instance("http://e", BOTH, "auto")
    assert await detect.asking(Engine(Timeouts(1, 1, 1, 1, 1, 1)), engine, 1.0)("/info") is None


@pytest.mark.parametrize(
    ("health", "role"),
    [
        (b'{"role": "decode"}', Role.DECODE),
        (b'{"role": "both", "more": 1}', BOTH),
        (b'{"role": "chef"}', None),
        (b'{"role": ["decode"]}', None),
        (b"{}", None),
        (b"[1]", None),
        (b"", None),
        (b"ok", None),
    ],
)
def test_health_may_tell_the_role(health: bytes, role: Role | None) -> None:
    assert detect.role_now(health) == role


async def test_ours_tell_what_they_were_at_first() -> None:
    said = {**OURS, "role": "decode", "started_as": "prefill"}
    found = await detect.native(asking({"/info": said}))
    assert found is not None and (found.role, found.started_as) == (Role.DECODE, Role.PREFILL)
