"""Our own engines. Field names are those of vLLM (pull) and vLLM-Ascend (push), so that the fleets look alike.

Media leave the body that goes to prefill and decode: each part becomes its grid and its mm_hash. Handles go to whoever
prefills; decode needs only the grids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proxy.core import BOTH, Api, Body, Handle, Item, Job, Order, Role
from proxy.dialects import bodies
from proxy.dialects.base import BadReply, Call, Dialect, Handles

_PICTURE = (  # a white square of 56 pixels
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAADgAAAA4AQAAAACA/QazAAAAFklEQVR42mP8z8DAwMDAwMQwSg9FGgAhHwFvTnfFwwAAAABJ"
    "RU5ErkJggg=="
)
_ENCODER_FIELDS = ("model", "mm_processor_kwargs", "media_io_kwargs", "priority", "session_id")


class Native(Dialect):
    """Both handoffs: `Order.DECODE_FIRST` is push, `Order.SEQUENTIAL` is pull."""

    name = "native"

    def __init__(self, order: Order) -> None:
        self.order = order

    def warm_up(self, role: Role, model: str) -> Call | None:
        """A picture, or a text; prefill and decode serve nobody alone."""
        named = {"model": model} if model else {}
        if role is Role.ENCODE:
            content = [{"type": "image_url", "image_url": {"url": _PICTURE}}]
            return Api.CHAT, {**named, "messages": [{"role": "user", "content": content}]}
        if role == BOTH:
            return Api.COMPLETIONS, {**named, "prompt": "hello", "max_tokens": 1, "temperature": 0}
        return None

    def encode(self, job: Job, items: Sequence[Item]) -> Body:
        kept = {name: job.body[name] for name in _ENCODER_FIELDS if name in job.body}
        content = [item.content for item in items]
        return {**kept, "messages": [{"role": "user", "content": content}], "stream": False}

    def awaits(self) -> Mapping[str, Any]:
        return {"announce": True}

    def read_encode(self, items: Sequence[Item], reply: Body) -> dict[int, Handle]:
        entries = reply.get("ec_transfer_params")
        if not isinstance(entries, dict):
            raise BadReply("the encoder's answer has no ec_transfer_params")
        return bodies.handles(items, entries)

    def blame(self, items: Sequence[Item], param: str | None) -> str | None:
        return bodies.blame(items, param)

    def prefill(self, job: Job, handles: Handles, handoff: Mapping[str, Any] | None) -> Body:
        bodies.one_prompt(job)
        body = bodies.of_one_token(_without_media(job, handles))
        body |= bodies.entries(job, handles)
        body["kv_transfer_params"] = bodies.ASK_FOR_KV if handoff is None else handoff
        if handoff is not None:
            body["min_tokens"] = 1
        return body

    def read_prefill(self, reply: Body) -> Mapping[str, Any]:
        params = reply.get("kv_transfer_params")
        if not isinstance(params, dict):
            raise BadReply("the prefill engine's answer has no kv_transfer_params")
        return params

    def decode(self, job: Job, handles: Handles, handoff: Mapping[str, Any] | None, metaserver: str) -> Body:
        bodies.one_prompt(job)
        body = _without_media(job, handles)
        body.pop("ec_transfer_params", None)  # a trusted client's; only prefill fetches embeddings
        asked = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": metaserver}
        return body | {"kv_transfer_params": asked if handoff is None else handoff}

    def whole(self, job: Job, handles: Handles) -> Body:
        return _without_media(job, handles) | bodies.entries(job, handles) if job.items else job.body

    def recorded(self, job: Job) -> Body | None:
        return {**job.body, "return_token_ids": True}

    def continued(self, job: Job, prompt: Sequence[int], said: Sequence[int]) -> Body | None:
        return {**job.body, "return_token_ids": True, "continue_token_ids": list(said)}


def _without_media(job: Job, handles: Handles) -> dict[str, Any]:
    """The client's body with each item replaced by its metadata, or left as it is where it has no handle."""

    def part(item: Item) -> Mapping[str, Any]:
        handle = handles.get(item.index)
        return item.content if handle is None else bodies.embeds(handle, handle.mm_hash)

    return bodies.with_parts(job, part)
