"""Who an engine is, asked of itself: family, version, role, and how that is known. Judges nothing and keeps nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import orjson

from proxy.core import BOTH, Instance, Role
from proxy.errors import EngineFailed, Unreachable
from proxy.media import vision
from proxy.upstream import Upstream

Ask = Callable[[str], Awaitable[Any]]
"""The JSON that a path answers with status 200; None for anything else. Raises EngineFailed if nobody answers."""

_LONGEST = 300  # characters of what an engine says that are kept
_LARGEST = 1 << 53  # of its numbers: what a float counts


@dataclass(frozen=True, slots=True)
class Found:
    """`role`: None if the engine does not say. `how`: for people. `facts`: see `Dialect`. `started_as`: the role that
    it had first; None if it can have no other."""

    family: str
    how: str
    role: Role | None = None
    model: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    started_as: Role | None = None


def asking(upstream: Upstream, instance: Instance, timeout: float) -> Ask:
    """Questions to one engine, `timeout` seconds each."""

    async def ask(path: str) -> Any:
        try:
            status, answer = await upstream.get(instance, path, timeout)
            said = orjson.loads(answer) if status == 200 else None
            orjson.dumps(said)  # what is nested too deeply for that could not be told to anybody
        except Unreachable:
            raise
        except (EngineFailed, orjson.JSONDecodeError, orjson.JSONEncodeError):
            return None
        return said

    return ask


async def detect(ask: Ask, family: str | None = None) -> Found | None:
    """The first family that recognizes the engine, or what `family` can tell of it; None if it is nobody known."""
    asked = list(dict.fromkeys(FAMILIES.values())) if family is None else [FAMILIES[family]]
    for recognize in asked:
        if (found := await recognize(ask)) is not None:
            return _modest(found)
    return None


def _modest(found: Found) -> Found:
    """As much of it as all workers can keep and any log can hold, whatever an engine says."""
    return replace(
        found,
        how=found.how[:_LONGEST],
        model=found.model[:_LONGEST],
        facts={name: _plain(value) for name, value in found.facts.items()},
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, int):
        return max(-_LARGEST, min(value, _LARGEST))
    return value if value is None or isinstance(value, float) else str(value)[:_LONGEST]


async def native(ask: Ask) -> Found | None:
    info = await ask("/info")
    if not isinstance(info, dict) or info.get("engine") != "triptych":
        return None
    label, facts = info.get("role"), {"version": info.get("version")}
    blocks, size = info.get("num_blocks"), info.get("block_size")
    if isinstance(blocks, int) and isinstance(size, int):
        facts["kv_tokens"] = blocks * size
    if info.get("encodes") is True:
        facts["encodes"] = True
    if (cut := vision.told(info.get("vision"))) is not None:
        facts["vision"] = asdict(cut)
        cache = info.get("cache")
        if isinstance(cache, dict) and isinstance(cache.get("capacity"), int):
            facts["cache_tokens"] = cache["capacity"] // cut.embedding_bytes
    role, started_as = _role(label), _role(info.get("started_as"))
    return Found("native", f"GET /info says triptych {label}", role, str(info.get("model") or ""), facts, started_as)


def role_now(health: bytes) -> Role | None:
    """What an engine of ours answers to GET /health tells of its role; None if nothing."""
    try:
        said = orjson.loads(health)
    except orjson.JSONDecodeError:
        return None
    return _role(said.get("role")) if isinstance(said, dict) else None


def _role(label: Any) -> Role | None:
    try:
        return Role.named(label)
    except (KeyError, TypeError):
        return None


async def vllm(ask: Ask) -> Found | None:
    """Its role is that of its list: no route of vLLM tells it."""
    card, said = await _card(ask, "vllm"), await ask("/version")
    version = said["version"] if isinstance(said, dict) and list(said) == ["version"] else None
    if card is None and version is None:
        return None
    owned = [] if card is None else ["GET /v1/models is owned by vllm"]  # with an API key it is not told
    how = ", ".join([*owned, *([] if version is None else [f"GET /version says {version}"])])
    return Found("vllm", how, None, "" if card is None else str(card["id"]), {"version": version} if version else {})


def plugged(found: Found) -> bool:
    """Whether a plugin puts other hardware under this vLLM, which does not say which: vLLM-Ascend's installation builds
    vLLM for no device, and vLLM's setup ends the version of that with `empty`."""
    return found.family == "vllm" and str(found.facts.get("version")).endswith(("+empty", ".empty"))


async def sglang(ask: Ask) -> Found | None:
    path = "/server_info"
    info = await ask(path)
    if not isinstance(info, dict):
        path = "/get_server_info"
        info = await ask(path)
    if not isinstance(info, dict) or "disaggregation_mode" not in info:
        return await _sglang_encoder(ask)
    mode = info["disaggregation_mode"]
    role = {"prefill": Role.PREFILL, "decode": Role.DECODE}.get(str(mode), BOTH)
    facts = {"version": info.get("version"), "language_only": bool(info.get("language_only"))}
    if role is Role.PREFILL:
        facts["bootstrap_port"] = info.get("disaggregation_bootstrap_port")
    if facts["language_only"] and info.get("encoder_transfer_backend"):
        facts["encoder_transfer_backend"] = info["encoder_transfer_backend"]
    if isinstance(info.get("max_total_num_tokens"), int):
        facts["kv_tokens"] = info["max_total_num_tokens"]
    model = info.get("served_model_name") or info.get("model_path") or ""
    how = f"GET {path} says sglang {info.get('version')}, disaggregation mode {mode}"
    return Found("sglang", how, role, str(model), facts)


async def _sglang_encoder(ask: Ask) -> Found | None:
    """It tells nothing of itself, but its web framework lists what can be called."""
    said = await ask("/openapi.json")
    paths = said.get("paths") if isinstance(said, dict) else None
    if not isinstance(paths, dict) or not {"/encode", "/scheduler_receive_url"} <= paths.keys():
        return None
    version = "0.5.19 or later" if "/scheduler_receive_meta_data" in paths else "before 0.5.19"
    how = f"GET /openapi.json lists the calls of an sglang encoder, {version}"
    return Found("sglang", how, Role.ENCODE, "", {"version": version})


FAMILIES: Mapping[str, Callable[[Ask], Awaitable[Found | None]]] = {
    "native": native,
    "vllm": vllm,
    "ascend": vllm,  # vLLM with other hardware under it, as far as can be asked
    "sglang": sglang,
}
"""By dialect; in the order in which engines of unknown family are asked."""


async def _card(ask: Ask, owner: str) -> Mapping[str, Any] | None:
    """The first model that an engine lists as `owner`'s."""
    models = await ask("/v1/models")
    data = models.get("data") if isinstance(models, dict) else None
    cards = [card for card in data if isinstance(card, dict)] if isinstance(data, list) else []
    return next((card for card in cards if card.get("owned_by") == owner and card.get("id")), None)


def bootstrap_url(instance: Instance, default: int) -> str:
    """Where a prefill engine's bootstrap server listens: on its host, at the port that its URL tells."""
    host = urlsplit(instance.url).hostname or ""
    port = instance.facts.get("bootstrap_port") or default
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


async def engine_ids(ask: Ask) -> dict[str, str]:
    """Of a vLLM Mooncake prefill engine, by data-parallel rank, from its bootstrap server; empty if it tells none."""
    ranks = await ask("/query")
    found = ranks if isinstance(ranks, dict) else {}
    return {
        rank: str(said["engine_id"])
        for rank, said in found.items()
        if rank.isdigit() and isinstance(said, dict) and said.get("engine_id")
    }
