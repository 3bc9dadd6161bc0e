"""What the connector does in vLLM's scheduler process. It never waits: see `courier` for what takes time.

Requests and features are vLLM's own objects; only these attributes of them are read:

    request.request_id, .mm_features, .ec_transfer_params
    feature.identifier (the mm_hash), .modality, .mm_position (.offset, .length, .get_num_embeds()), .data
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from engines.ec_connector.arrivals import Arrivals, Wanted
from engines.ec_connector.courier import Courier
from engines.ec_connector.options import Options
from engines.ec_connector.shelf import Shelf
from engines.transfer.storage import KEY

Describe = Callable[[Sequence[Any]], dict[str, dict[str, Any]]]
"""Features → {mm_hash: {"item_indices", "metadata"}}: vLLM's own description of what a consumer must be told."""
Fields = Callable[[str], set[str]]
"""Modality → names of processed data that only describe an item: no others are there when the media stayed away."""


class SchedulerSide:
    def __init__(self, options: Options, courier: Courier, shelf: Shelf, *, describe: Describe, fields: Fields) -> None:
        self._courier, self._shelf = courier, shelf
        self._describe, self._fields = describe, fields
        self._arrivals = Arrivals(courier, options.shelf_bytes)
        self._loads: dict[str, None] = {}
        self._asked: set[str] = set()

    def __repr__(self) -> str:
        return f"<SchedulerSide {self._arrivals!r}>"

    # ---- a consumer

    def available(self, request: Any, num_computed_tokens: int) -> bool:
        """Whether the embeddings of all items that are not computed yet are here, or nobody promised any."""
        self._courier.report(self._arrivals)
        wanted = self._wanted(request, num_computed_tokens)
        return self._arrivals.ready(request.request_id, wanted)

    def _wanted(self, request: Any, num_computed_tokens: int) -> Iterator[Wanted]:
        entries = request.ec_transfer_params or {}
        for feature in request.mm_features:
            position = feature.mm_position
            if position.offset + position.length > num_computed_tokens:
                entry = entries.get(feature.identifier)
                yield Wanted(
                    feature.identifier,
                    position.get_num_embeds(),
                    entry if isinstance(entry, Mapping) else {},
                    self._encodable(feature),
                )

    def _encodable(self, feature: Any) -> bool:
        return feature.data is not None and not set(feature.data) <= self._fields(feature.modality)

    def has(self, key: str) -> bool:
        return key in self._arrivals

    def will_load(self, key: str) -> None:
        """vLLM has made room for it: the workers load it in this step."""
        if key in self._arrivals:
            self._loads[key] = None

    def take_loads(self) -> list[str]:
        """The keys to load in this step. Ends a pass of the scheduler."""
        loads, self._loads = list(self._loads), {}
        self._arrivals.tick()
        return loads

    def take_lost(self) -> set[str]:
        return self._arrivals.take_lost()

    # ---- a producer

    def ask(self, request: Any) -> None:
        """The request's embeddings are wanted: those that nobody can fetch (any more) are published again."""
        self._asked.update(feature.identifier for feature in request.mm_features)

    def take_unpublished(self) -> list[str]:
        """The keys that workers must save in this step if they have them, besides those that they encode."""
        asked, self._asked = self._asked, set()
        return [key for key in asked if KEY.fullmatch(key) and not self._courier.published(key)]

    def published(self, request: Any) -> dict[str, dict[str, Any]] | None:
        """The answer's ec_transfer_params. An item that could not be published has no metadata, so that nobody relies
        on it."""
        entries = self._describe(request.mm_features)
        modalities = {feature.identifier: feature.modality for feature in request.mm_features}
        for key, entry in entries.items():
            found = self._courier.publish(key) if KEY.fullmatch(key) else {}
            entry |= {"modality": modalities[key], **found}
            if not found:
                entry["metadata"] = {}
        return entries or None

    # ---- both

    @property
    def store(self) -> str:
        """The folder that workers put into what is to be published."""
        return str(self._courier.store.folder)

    @property
    def shelf(self) -> str:
        """The folder that workers load from."""
        return str(self._shelf.folder)

    def finished(self, request: Any) -> None:
        self._arrivals.finished(request.request_id)

    def close(self) -> None:
        self._courier.close()
        self._shelf.remove()
