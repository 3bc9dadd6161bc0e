"""Bodies as several families shape them: what encoders, prefill and decode get of a client's request."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from proxy.core import Api, Handle, Item, Job
from proxy.dialects.base import BadReply, Handles
from proxy.errors import BadRequest

ASK_FOR_KV: Mapping[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""What a prefill engine is told whose answer is to say where its KV is."""

_POSITION = re.compile(r"messages\[0\]\.content\[(\d+)\]")
_OF_THE_ANSWER = frozenset(
    {
        "add_generation_prompt",
        "continue_final_message",
        "ec_transfer_params",
        "echo",
        "functions",
        "function_call",
        "kv_transfer_params",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "min_tokens",
        "n",
        "parallel_tool_calls",
        "prompt_logprobs",
        "response_format",
        "return_token_ids",
        "stop",
        "stop_token_ids",
        "stream",
        "stream_options",
        "structured_outputs",
        "tool_choice",
        "tools",
        "top_logprobs",
    }
)


def for_encoder(job: Job, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """These parts and nothing else of the conversation; of the other fields all that are not about the answer."""
    kept = {name: value for name, value in job.body.items() if name not in _OF_THE_ANSWER}
    return {**kept, "messages": [{"role": "user", "content": list(parts)}], "stream": False}


def handles(items: Sequence[Item], entries: Mapping[str, Any]) -> dict[int, Handle]:
    """A handle for each of `items` out of an encoder's `ec_transfer_params`, by the positions that its entries name.

    An item whose entry has empty metadata was encoded and not published: it has none. Raises BadReply.
    """
    found: dict[int, Handle | None] = {}
    for mm_hash, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("metadata"), dict):
            raise BadReply(f"the encoder's entry for {mm_hash} has no metadata")
        positions = entry.get("item_indices", [])
        if not isinstance(positions, list):
            raise BadReply(f"the encoder's entry for {mm_hash} names no list of items")
        for position in positions:
            if isinstance(position, int) and 0 <= position < len(items):
                item = items[position]
                if entry.get("modality", item.modality) == item.modality:  # not the sound of a video
                    metadata = entry["metadata"]
                    found[item.index] = Handle(mm_hash, item.modality, metadata, entry) if metadata else None
    missing = [item.param for item in items if item.index not in found]
    if missing:
        raise BadReply(f"the encoder's answer says nothing of {', '.join(missing)}")
    return {index: handle for index, handle in found.items() if handle is not None}


def blame(items: Sequence[Item], param: str | None) -> str | None:
    """An encoder's `error.param` in the client's own positions, if it names one of `items`."""
    match = _POSITION.fullmatch(param or "")
    if match is None or int(match[1]) >= len(items):
        return param
    return items[int(match[1])].param


def entries(job: Job, handles: Handles) -> dict[str, Any]:
    """The field with all handles, besides those that a trusted client brought; empty if there are none."""
    if not handles:
        return {}
    brought = job.body.get("ec_transfer_params") or {}
    return {"ec_transfer_params": {**brought, **{handle.mm_hash: handle.entry for handle in handles.values()}}}


def embeds(handle: Handle, uuid: str) -> dict[str, Any]:
    """A part that stands for media whose embedding is elsewhere: its metadata alone."""
    kind = f"{handle.modality}_embeds"
    return {"type": kind, kind: handle.metadata, "uuid": uuid}


def with_parts(job: Job, part: Callable[[Item], Mapping[str, Any]]) -> dict[str, Any]:
    """The client's body with `part` of each item in its place. Only what contains an item is copied."""
    body = dict(job.body)
    if not job.items:
        return body
    messages = list(body["messages"])
    for item in job.items:
        if messages[item.message] is job.body["messages"][item.message]:
            message = messages[item.message]
            messages[item.message] = {**message, "content": list(message["content"])}
        messages[item.message]["content"][item.part] = part(item)
    body["messages"] = messages
    return body


def of_one_token(body: dict[str, Any]) -> dict[str, Any]:
    """A body from `with_parts`, changed so that its answer is one token, whole."""
    for name in ("stream_options", "min_tokens"):
        body.pop(name, None)
    body |= {"stream": False, "max_tokens": 1}
    for name in ("max_completion_tokens", "n"):
        if name in body:
            body[name] = 1
    return body


def prompts(job: Job) -> Sequence[Any]:
    """The prompts of /v1/completions, each a sequence of its own to the engine; a chat has one."""
    prompt = job.body.get("prompt")
    if job.api is Api.COMPLETIONS and isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return prompt
    return [prompt]


def one_prompt(job: Job) -> None:
    """Raises BadRequest if there are several."""
    if len(prompts(job)) > 1:
        raise BadRequest(
            "one request carries one prompt where prefill and decode run apart: send the prompts one by one",
            param="prompt",
            code="several_prompts",
        )
