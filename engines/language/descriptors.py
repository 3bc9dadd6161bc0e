"""`kv_transfer_params`, both ways: what a request says about its KV, and what we tell the other engine about ours.

Pure. Field names are those of vLLM's pull and vLLM-Ascend's layer-wise push; `offer`, `where` and `layout` are our own.

    Keep                                      no kv_transfer_params: prefill and decode here
    Push     do_remote_decode, offer          prefill here, write the KV into the offered blocks
    Publish  do_remote_decode                 prefill here, keep the blocks until they are read
    Ask      do_remote_prefill, metaserver    decode here, have somebody push
    Fetch    do_remote_prefill, where         decode here, read what was published
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.errors import BadRequest

FIELD = "kv_transfer_params"
WRONG_ROLE = "role"
"""The code of the error for a plan that the engine's role excludes."""


@dataclass(frozen=True, slots=True)
class Keep:
    pass


@dataclass(frozen=True, slots=True)
class Push:
    offer: Mapping[str, Any]
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Publish:
    pass


@dataclass(frozen=True, slots=True)
class Ask:
    metaserver: str


@dataclass(frozen=True, slots=True)
class Fetch:
    where: Mapping[str, Any]
    layout: Mapping[str, Any]
    num_tokens: int


Plan = Keep | Push | Publish | Ask | Fetch

ROLES: Mapping[str, tuple[type, ...]] = {
    "both": (Keep, Push, Publish, Ask, Fetch),
    "prefill": (Push, Publish),
    "decode": (Ask, Fetch),
}


def read(params: Any, role: str) -> Plan:
    """What to do with a request's KV. Raises BadRequest, also for a plan that the engine's role excludes."""
    plan = _read(params)
    if not isinstance(plan, ROLES[role]):
        hint = {
            "prefill": "it serves requests whose kv_transfer_params say do_remote_decode",
            "decode": "it serves requests whose kv_transfer_params say do_remote_prefill",
        }[role]
        raise BadRequest(
            f"this engine's role is {role}: {hint}; send it through the proxy", param=FIELD, code=WRONG_ROLE
        )
    return plan


def _read(params: Any) -> Plan:
    if params is None:
        return Keep()
    if not isinstance(params, Mapping):
        raise BadRequest("kv_transfer_params must be an object", param=FIELD)
    decode_there, prefill_there = params.get("do_remote_decode"), params.get("do_remote_prefill")
    if decode_there and prefill_there:
        raise BadRequest("do_remote_decode and do_remote_prefill exclude each other", param=FIELD)
    if decode_there:
        return _push(params) if params.get("offer") is not None else Publish()
    if prefill_there:
        return _ask(params) if params.get("metaserver") is not None else _fetch(params)
    return Keep()


def _push(params: Mapping[str, Any]) -> Push:
    offer, groups = params["offer"], params.get("remote_block_ids")
    if not isinstance(offer, Mapping):
        raise BadRequest("offer must be an object", param=f"{FIELD}.offer")
    if not (isinstance(groups, list) and len(groups) == 1 and _ints(groups[0])):
        raise BadRequest("remote_block_ids must be one list of block numbers", param=f"{FIELD}.remote_block_ids")
    return Push(offer, tuple(groups[0]))


def _ask(params: Mapping[str, Any]) -> Ask:
    url = params["metaserver"]
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        raise BadRequest("metaserver must be an http(s) URL", param=f"{FIELD}.metaserver")
    return Ask(url)


def _fetch(params: Mapping[str, Any]) -> Fetch:
    where, layout, count = params.get("where"), params.get("layout"), params.get("remote_num_tokens")
    if not isinstance(where, Mapping) or not isinstance(layout, Mapping) or not isinstance(count, int):
        raise BadRequest(
            "where, layout and remote_num_tokens are missing: this engine reads KV of Triptych's prefill engines, and "
            "asks a metaserver for it when the params name one",
            param=FIELD,
        )
    return Fetch(where, layout, count)


def _ints(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(number, int) for number in value)


@dataclass(frozen=True, slots=True)
class Self:
    """How other engines know this one."""

    engine_id: str
    host: str
    port: int
    ranks: int = 1


def asking(
    me: Self, request_id: str, blocks: Sequence[int], block_size: int, offer: Mapping[str, Any]
) -> dict[str, Any]:
    """What decode posts to the metaserver, as vLLM-Ascend's MooncakeLayerwiseConnector does."""
    return {
        "token_ids": [],
        "request_id": request_id,
        "do_remote_prefill": False,
        "do_remote_decode": True,
        "remote_block_ids": [list(blocks)],
        "remote_block_size": [block_size],
        "remote_engine_id": me.engine_id,
        "remote_host": me.host,
        "remote_port": me.port,
        "remote_tp_size": me.ranks,
        "remote_pcp_size": 1,
        "remote_dcp_size": 1,
        "remote_cached_tokens": 0,
        "offer": dict(offer),
    }


def published(
    me: Self,
    request_id: str,
    blocks: Sequence[int],
    num_tokens: int,
    where: Mapping[str, Any],
    layout: Mapping[str, Any],
) -> dict[str, Any]:
    """What prefill answers, as vLLM's NixlConnector does; passed verbatim to decode."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [list(blocks)],
        "remote_engine_id": me.engine_id,
        "remote_request_id": request_id,
        "remote_host": me.host,
        "remote_port": me.port,
        "remote_num_tokens": num_tokens,
        "tp_size": me.ranks,
        "where": dict(where),
        "layout": dict(layout),
    }
