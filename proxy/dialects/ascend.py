"""vLLM-Ascend, in both of its ways to hand over KV: MooncakeLayerwiseConnector (`Order.DECODE_FIRST`, its default) and
MooncakeConnectorV1 (`Order.SEQUENTIAL`). The two must not be mixed up: a layer-wise prefill engine dies of a request
that no decode engine has described.

Its encoders leave embeddings in a folder under each item's hash and answer nothing of them. So every stage gets the
media: prefill finds the embedding, or encodes once more where there is none, and decode counts its prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from proxy.core import Api, Body, Handle, Item, Job, Order, Role
from proxy.dialects import bodies
from proxy.dialects.base import BadReply, Call, Dialect, Handles
from proxy.errors import BadRequest

_ONE_TOKEN: dict[str, Any] = {"max_tokens": 1, "min_tokens": 1}
# Where a chat engine reads the tokens of its prompt instead of rendering the messages: releases of vLLM-Ascend from
# v0.26 the first, vLLM since its #48145 the second.
_TOKENS = ("_vllm_ascend_recompute_token_ids", "prompt_token_ids")
_DEFAULT_MAX_TOKENS = 16  # of /v1/completions


class Ascend(Dialect):
    """`uuid`s are ours, so that encoder and prefill engine look for an item under the same name."""

    name = "ascend"
    remote_prefills = 32  # threads of a decode engine's scheduler that call the metaserver, each until its prefill ends
    owes_prefill = True  # only prefill's message frees the blocks, and a prefill that is cancelled sends none
    continues_as_prompt = True
    given_up = "recomputed"  # a preempted sequence; --additional-config '{"recompute_scheduler_enable":true}'

    def __init__(self, order: Order | None = None) -> None:
        self.order = Order.SEQUENTIAL if order is Order.SEQUENTIAL else Order.DECODE_FIRST

    def encode(self, job: Job, items: Sequence[Item]) -> Body:
        return bodies.for_encoder(job, [item.content for item in items]) | _ONE_TOKEN

    def read_encode(self, items: Sequence[Item], reply: Body) -> dict[int, Handle]:
        if not isinstance(reply.get("choices"), list):
            raise BadReply("the encoder's answer has no choices")
        return {}

    def blame(self, items: Sequence[Item], param: str | None) -> str | None:
        return bodies.blame(items, param)

    def prefills(self, job: Job) -> int:
        n = job.body.get("n")
        return len(bodies.prompts(job)) * (n if isinstance(n, int) and n > 1 else 1)

    def prefill(self, job: Job, handles: Handles, handoff: Mapping[str, Any] | None) -> Body:
        body = bodies.of_one_token(_with_media(job)) | _ONE_TOKEN
        body.pop("return_token_ids", None)
        if handoff is None:
            bodies.one_prompt(job)
        elif job.api is Api.COMPLETIONS:
            body["prompt"] = _prompt_of(job, handoff)
        return body | {"kv_transfer_params": {**(handoff or bodies.ASK_FOR_KV), **_tokens(job)}}

    def read_prefill(self, reply: Body) -> Mapping[str, Any]:
        params = reply.get("kv_transfer_params")
        if not isinstance(params, dict):
            raise BadReply("the prefill engine's answer has no kv_transfer_params")
        return params

    def decode(self, job: Job, handles: Handles, handoff: Mapping[str, Any] | None, metaserver: str) -> Body:
        asked = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": metaserver}
        return _with_media(job) | {"kv_transfer_params": {**(asked if handoff is None else handoff), **_tokens(job)}}

    def whole(self, job: Job, handles: Handles) -> Body:
        return _with_media(job) if job.items else job.body

    def warm_up(self, role: Role, model: str) -> Call | None:
        if role is Role.ENCODE:
            return None
        return Api.COMPLETIONS, {"model": model, "prompt": "hello", "max_tokens": 1}

    def recorded(self, job: Job) -> Body | None:
        return {**job.body, "return_token_ids": True}

    def continued(self, job: Job, prompt: Sequence[int], said: Sequence[int]) -> Body | None:
        limit, fewer = _limit(job), dict[str, int]()
        if not prompt or (limit is not None and limit[1] <= len(said)):
            return None
        if limit is not None:
            fewer[limit[0]] = limit[1] - len(said)
        if isinstance(least := job.body.get("min_tokens"), int):
            fewer["min_tokens"] = max(0, least - len(said))
        tokens = [*prompt, *said]
        if job.api is Api.COMPLETIONS:
            where: dict[str, Any] = {"prompt": tokens}
        else:
            where = {"kv_transfer_params": dict.fromkeys(_TOKENS, tokens)}
        return {**job.body, "return_token_ids": True, **fewer, **where}


def _with_media(job: Job) -> dict[str, Any]:
    """The client's body with its items under our names."""
    body = bodies.with_parts(job, lambda item: item.content)
    body.pop("ec_transfer_params", None)
    return body


def _tokens(job: Job) -> dict[str, Any]:
    """The tokens of a chat that goes on, as `continued` gave them."""
    params = job.body.get("kv_transfer_params") or {}
    return {name: params[name] for name in _TOKENS if name in params}


def _prompt_of(job: Job, descriptor: Mapping[str, Any]) -> Any:
    """The prompt of the sequence `cmpl-<id>-<i>` that a decode engine describes. Raises BadRequest."""
    prompts = bodies.prompts(job)
    match = re.search(rf"cmpl-{re.escape(job.id)}-(\d+)", str(descriptor.get("request_id")))
    index = int(match[1]) if match else 0
    if index >= len(prompts):
        raise BadRequest(f"the request has no prompt {index}", param="request_id")
    return prompts[index]


def _limit(job: Job) -> tuple[str, int] | None:
    """The field that bounds the answer's tokens, and its value; None where only the engine's context does."""
    for name in ("max_completion_tokens", "max_tokens"):
        if isinstance(value := job.body.get(name), int):
            return name, value
    return ("max_tokens", _DEFAULT_MAX_TOKENS) if job.api is Api.COMPLETIONS else None
