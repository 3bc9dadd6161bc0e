"""Our own engines. Field names are those of vLLM (pull) and vLLM-Ascend (push), so that the fleets look alike.

Media leave the body that goes to prefill and decode: each part becomes its grid and its mm_hash. Handles go to whoever
prefills; decode needs only the grids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from proxy.core import Api, Body, Handle, Item, Job, Order
from proxy.dialects.base import BadReply, Dialect, Handles
from proxy.errors import BadRequest

_ENCODER_FIELDS = ("model", "mm_processor_kwargs", "media_io_kwargs", "priority", "session_id")
_POSITION = re.compile(r"messages\[0\]\.content\[(\d+)\]")
_ASK_PULL: Mapping[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class Native(Dialect):
    """Both handoffs: `Order.DECODE_FIRST` is push, `Order.SEQUENTIAL` is pull."""

    name = "native"

    def __init__(self, order: Order) -> None:
        self.order = order

    def encode(self, job: Job, items: Sequence[Item]) -> Body:
        kept = {name: job.body[name] for name in _ENCODER_FIELDS if name in job.body}
        content = [item.content for item in items]
        return {**kept, "messages": [{"role": "user", "content": content}], "stream": False}

    def read_encode(self, items: Sequence[Item], reply: Body) -> dict[int, Handle]:
        entries = reply.get("ec_transfer_params")
        if not isinstance(entries, dict):
            raise BadReply("the encoder's answer has no ec_transfer_params")
        found: dict[int, Handle] = {}
        for mm_hash, entry in entries.items():
            handle = _handle(mm_hash, entry)
            for position in entry.get("item_indices", ()):
                if isinstance(position, int) and 0 <= position < len(items):
                    found[items[position].index] = handle
        missing = [item.param for item in items if item.index not in found]
        if missing:
            raise BadReply(f"the encoder's answer says nothing of {', '.join(missing)}")
        return found

    def blame(self, items: Sequence[Item], param: str | None) -> str | None:
        match = _POSITION.fullmatch(param or "")
        if match is None or int(match[1]) >= len(items):
            return param
        return items[int(match[1])].param

    def prefill(self, job: Job, handles: Handles, handoff: Mapping[str, Any] | None) -> Body:
        _one_prompt(job)
        body = _without_media(job, handles)
        body.pop("stream_options", None)
        body.pop("min_tokens", None)
        body |= _entries(job, handles)
        body |= {"kv_transfer_params": _ASK_PULL if handoff is None else handoff, "stream": False, "max_tokens": 1}
        for name in ("max_completion_tokens", "n"):
            if name in body:
                body[name] = 1
        if handoff is not None:
            body["min_tokens"] = 1
        return body

    def read_prefill(self, reply: Body) -> Mapping[str, Any]:
        params = reply.get("kv_transfer_params")
        if not isinstance(params, dict):
            raise BadReply("the prefill engine's answer has no kv_transfer_params")
        return params

    def decode(self, job: Job, handles: Handles, handoff: Mapping[str, Any] | None, metaserver: str) -> Body:
        _one_prompt(job)
        body = _without_media(job, handles)
        body.pop("ec_transfer_params", None)  # a trusted client's; only prefill fetches embeddings
        asked = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": metaserver}
        return body | {"kv_transfer_params": asked if handoff is None else handoff}

    def whole(self, job: Job, handles: Handles) -> Body:
        return _without_media(job, handles) | _entries(job, handles) if job.items else job.body


def _handle(mm_hash: str, entry: Any) -> Handle:
    if not isinstance(entry, dict) or not isinstance(entry.get("metadata"), dict):
        raise BadReply(f"the encoder's entry for {mm_hash} has no metadata")
    return Handle(mm_hash, str(entry.get("modality", "image")), entry["metadata"], entry)


def _entries(job: Job, handles: Handles) -> dict[str, Any]:
    """The field with all handles, besides those that a trusted client brought; empty if there are none."""
    if not handles:
        return {}
    brought = job.body.get("ec_transfer_params") or {}
    return {"ec_transfer_params": {**brought, **{handle.mm_hash: handle.entry for handle in handles.values()}}}


def _without_media(job: Job, handles: Handles) -> dict[str, Any]:
    """The client's body with each item replaced by its metadata, or left to be encoded inline where it has no handle.

    Only what contains an item is copied.
    """
    body = dict(job.body)
    if not job.items:
        return body
    messages = list(body["messages"])
    for item in job.items:
        if messages[item.message] is job.body["messages"][item.message]:
            message = messages[item.message]
            messages[item.message] = {**message, "content": list(message["content"])}
        handle = handles.get(item.index)
        messages[item.message]["content"][item.part] = item.content if handle is None else _embeds(handle)
    body["messages"] = messages
    return body


def _embeds(handle: Handle) -> dict[str, Any]:
    kind = f"{handle.modality}_embeds"
    return {"type": kind, kind: handle.metadata, "uuid": handle.mm_hash}


def _one_prompt(job: Job) -> None:
    prompt = job.body.get("prompt")
    if job.api is Api.COMPLETIONS and isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        raise BadRequest(
            "one request carries one prompt where prefill and decode run apart: send the prompts one by one",
            param="prompt",
            code="several_prompts",
        )
