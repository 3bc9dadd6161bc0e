"""vLLM 0.32 and later, and in a compatibility mode those before, whose encoders do not say where embeddings are.

    NixlConnector, ExampleConnector    Order.SEQUENTIAL   what P answers is what D gets
    MooncakeConnector                  Order.TOGETHER     a transfer id of ours, and what P's bootstrap server told

An engine that is given an item's metadata alone, and has not got its embedding, ends with all its requests. So metadata
go alone only where the embedding is sure to be published, or to be missed without harm; else the media go along, under
the same hash: the engine then takes the embedding if it is there, and encodes if it is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from proxy.core import Api, Body, Handle, Instance, Item, Job, Order, Role
from proxy.dialects import bodies
from proxy.dialects.base import BadReply, Call, Dialect, Handles, Media, Options

_REPORTS = (0, 32)  # the first release whose encoders report handles and whose prefill takes metadata
_VERSION = re.compile(r"(\d+)\.(\d+)")
_FACTORS = ("mm_processor_kwargs", "media_io_kwargs")


class Vllm(Dialect):
    name = "vllm"
    vague = True

    def __init__(self, options: Options, instance: Instance) -> None:
        self._instance = instance
        self._media = options.media
        self.media_instead = options.media is not Media.NEVER
        concurrent = options.order in (Order.TOGETHER, Order.DECODE_FIRST) or "bootstrap_port" in instance.facts
        self.order = Order.TOGETHER if concurrent else Order.SEQUENTIAL

    # ---- encode

    def batches(self, items: Sequence[Item]) -> Sequence[Sequence[Item]]:
        """Images of one call are told apart by their positions; other media are called for one by one."""
        images = [item for item in items if item.modality == "image"]
        others = [[item] for item in items if item.modality != "image"]
        return [images, *others] if images else others

    def encode(self, job: Job, items: Sequence[Item]) -> Body:
        body = bodies.for_encoder(job, [self._content(item) for item in items])
        return body if self._reports else body | {"max_tokens": 1}

    def read_encode(self, items: Sequence[Item], reply: Body) -> dict[int, Handle]:
        entries = reply.get("ec_transfer_params")
        if isinstance(entries, dict) and entries:
            return bodies.handles(items, entries)
        if not isinstance(reply.get("choices"), list):
            raise BadReply("the encoder's answer has no choices")
        if self._version is not None and self._reports:
            raise BadReply("the encoder's answer has no ec_transfer_params: is it started with --ec-transfer-config?")
        return {}

    def blame(self, items: Sequence[Item], param: str | None) -> str | None:
        return bodies.blame(items, param)

    def expects(self, items: Sequence[Item], room: int) -> Mapping[str, Any]:
        """For ECMooncakeConnector, whose encoders push: where to, and a name for each transfer."""
        port = self._instance.facts.get("ec_port")
        if port is None:
            return {}
        names = [{"transfer_id": f"{room:016x}{item.index:04x}"} for item in items]
        return {"ec_transfer_params": {"consumer_zmq": f"tcp://{self._host}:{port}", "ec_items": names}}

    # ---- prefill and decode

    def rendezvous(self, job: Job, room: int) -> Mapping[str, Any]:
        engine_ids = self._instance.facts["engine_ids"]
        rank = sorted(engine_ids, key=int)[room % len(engine_ids)]
        return {
            "transfer_id": f"xfer-{job.id}-{room:016x}",
            "remote_bootstrap_addr": self._instance.facts["bootstrap"],
            "remote_engine_id": engine_ids[rank],
            "rank": rank if len(engine_ids) > 1 else None,
        }

    def headers(self, handoff: Mapping[str, Any] | None) -> Mapping[str, str]:
        rank = handoff.get("rank") if handoff else None
        return {} if rank is None else {"x-data-parallel-rank": rank}

    def prefill(self, job: Job, handles: Handles, handoff: Mapping[str, Any] | None) -> Body:
        bodies.one_prompt(job)
        body = bodies.of_one_token(self._fetching(job, handles))
        if handoff is None:
            return body | {"kv_transfer_params": bodies.ASK_FOR_KV}
        asked = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": handoff["transfer_id"]}
        return body | {"min_tokens": 1, "kv_transfer_params": asked}  # an answer that stops by itself frees its KV

    def read_prefill(self, reply: Body) -> Mapping[str, Any]:
        """Empty where decode finds the KV by the prompt alone (ExampleConnector), or must make it anew."""
        if not isinstance(reply.get("choices"), list):
            raise BadReply("the prefill engine's answer has no choices")
        params = reply.get("kv_transfer_params") or {}
        if not isinstance(params, dict):
            raise BadReply("the prefill engine's kv_transfer_params are no object")
        return params

    def decode(self, job: Job, handles: Handles, handoff: Mapping[str, Any] | None, metaserver: str) -> Body:
        bodies.one_prompt(job)
        if not handoff:
            return self._without_handles(job, {})
        body = self._without_handles(job, {} if self._media is Media.ALWAYS else handles)
        if "transfer_id" not in handoff:
            return body | {"kv_transfer_params": handoff}
        told = {name: value for name, value in handoff.items() if name != "rank"}
        return body | {"kv_transfer_params": {"do_remote_decode": False, "do_remote_prefill": True, **told}}

    def whole(self, job: Job, handles: Handles) -> Body:
        return self._fetching(job, handles) if job.items else job.body

    def warm_up(self, role: Role, model: str) -> Call | None:
        """A text: the first takes seconds longer than others. An encoder answers it with nothing."""
        named = {"model": model} if model else {}
        if role is Role.ENCODE:
            return Api.CHAT, {**named, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
        return Api.COMPLETIONS, {**named, "prompt": "hello", "max_tokens": 1, "temperature": 0}

    # ---- media, or what stands for them

    @property
    def _host(self) -> str:
        host = urlsplit(self._instance.url).hostname or ""
        return f"[{host}]" if ":" in host else host

    @property
    def _version(self) -> tuple[int, int] | None:
        found = _VERSION.match(str(self._instance.facts.get("version", "")))
        return None if found is None else (int(found[1]), int(found[2]))

    @property
    def _reports(self) -> bool:
        return self._version is None or self._version >= _REPORTS

    def _content(self, item: Item) -> Mapping[str, Any]:
        """Media under our hash; an engine of old hashes them itself, as its encoder does."""
        if self._reports:
            return item.content
        return {name: value for name, value in item.content.items() if name != "uuid"}

    def _without_handles(self, job: Job, handles: Handles) -> dict[str, Any]:
        """For whoever need not fetch embeddings: metadata of the items with a handle, and the media of the others."""
        known = handles if self._reports else {}
        body = bodies.with_parts(job, lambda item: self._metadata(job, item, known))
        body.pop("ec_transfer_params", None)
        return body

    def _metadata(self, job: Job, item: Item, handles: Handles) -> Mapping[str, Any]:
        handle = handles.get(item.index)
        if handle is None or (item.modality == "video" and _hears_video(job)):
            return self._content(item)
        return bodies.embeds(handle, item.mm_hash or handle.mm_hash)

    def _fetching(self, job: Job, handles: Handles) -> dict[str, Any]:
        """For whoever prefills: told where embeddings are, and given the media that it might have to encode."""
        if not self._reports:
            return self._without_handles(job, {})

        def part(item: Item) -> Mapping[str, Any]:
            handle = handles.get(item.index)
            alone = handle is not None and self._sure(job, item, handle)
            return self._metadata(job, item, handles) if alone else self._content(item)

        body = bodies.with_parts(job, part) | bodies.entries(job, handles)
        pushed = {h.mm_hash: h.entry["transfer_id"] for h in handles.values() if "transfer_id" in h.entry}
        if pushed:
            names = [{"mm_hash": mm_hash, "transfer_id": name} for mm_hash, name in pushed.items()]
            body["ec_transfer_params"] = {**body["ec_transfer_params"], "ec_items": names}
        return body

    def _sure(self, job: Job, item: Item, handle: Handle) -> bool:
        """Whether this item's metadata may go alone."""
        rehashed = any(job.body.get(name) for name in _FACTORS)  # a uuid, together with these
        if rehashed and item.mm_hash in (None, handle.mm_hash):
            return False  # the encoder's name for it would be hashed once more
        if self._media is Media.AUTO:
            return _harmless(handle)
        return self._media is Media.NEVER


def _harmless(handle: Handle) -> bool:
    """Whether its embedding can be missed without harm: ECMooncakeConnector and our own connector fail the request, but
    vLLM's own reads the files of any encoder's folder, ours included."""
    where = handle.entry.get("where")
    return "transfer_id" in handle.entry or (isinstance(where, dict) and where.get("transport") != "storage")


def _hears_video(job: Job) -> bool:
    """Whether each video is two items to the engine, of which an encoder's answer shows one."""
    factors = job.body.get("mm_processor_kwargs")
    return isinstance(factors, dict) and bool(factors.get("use_audio_in_video"))
