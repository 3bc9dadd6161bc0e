"""SGLang. Prefill and decode get the same request at once and meet in a room; media go to whoever prefills.

No encoder is called here: a server with `--language-only` takes ordinary bodies and calls encoders itself, real ones or
the proxy as one (`proxy.sglang.virtual_encoder`). Wire read in SGLang 0.5.10 and 0.5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from proxy.core import BOTH, Body, Instance, Item, Job, Order, Role
from proxy.dialects import bodies
from proxy.dialects.base import Call, Dialect, Handles, Options

SELF_FED = "sglang's own servers"
"""Whom SGLang's encoders feed: no plan of ours, since language servers call them themselves."""

_CHOICES = 256  # rooms that one request may take: its n-th choice meets in the n-th room after the one that is named
_NOBODY = {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0}  # SGLang's own word for a warm-up without a peer


class Sglang(Dialect):
    """`facts`: `bootstrap_port` of a prefill server, 8998 by its own default."""

    name = "sglang"
    order = Order.TOGETHER
    verify_images = True

    def __init__(self, options: Options, instance: Instance) -> None:
        self._instance = instance

    def rendezvous(self, job: Job, room: int) -> Mapping[str, Any]:
        return {
            "bootstrap_host": urlsplit(self._instance.url).hostname,
            "bootstrap_port": self._instance.facts.get("bootstrap_port"),
            "bootstrap_room": room - room % _CHOICES,
        }

    def prefill(self, job: Job, handles: Handles, handoff: Mapping[str, Any] | None) -> Body:
        """As decode's, whose n and lengths it must have, but whole: only its status is of interest."""
        body = {**_body(job), **(handoff or {}), "stream": False}
        body.pop("stream_options", None)
        return body

    def decode(self, job: Job, handles: Handles, handoff: Mapping[str, Any] | None, metaserver: str) -> Body:
        return {**_body(job), **(handoff or {})}

    def whole(self, job: Job, handles: Handles) -> Body:
        return _body(job)

    def abort(self, request_id: str) -> Call | None:
        return "/abort_request", {"rid": rid(request_id)}

    def warm_up(self, role: Role, model: str) -> Call | None:
        if role is Role.ENCODE:
            return None  # its own /health encodes an image
        named = {"model": model} if model else {}
        body = {**named, "prompt": "Hi", "max_tokens": 1, "temperature": 0}
        return "/v1/completions", body if role == BOTH else body | _NOBODY


def rid(request_id: str) -> str:
    """SGLang's name for a request of ours. It aborts every request whose name begins like the one it is told, so no
    name may be the beginning of another: `~` is in no id of ours."""
    return f"{request_id}~"


def request_id(rid: str) -> str:
    """The request behind a `rid` of ours; anybody else's unchanged."""
    return rid.removesuffix("~")


def _body(job: Job) -> dict[str, Any]:
    body = bodies.with_parts(job, _part)
    for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room"):
        body.pop(name, None)  # rooms are ours: an engine dies of one that is used twice
    return {**body, "rid": rid(job.id)}


def _part(item: Item) -> Mapping[str, Any]:
    """The client's own: SGLang knows no `uuid`."""
    return {name: value for name, value in item.content.items() if name != "uuid"}
