"""The little of vLLM that the out-of-tree connector imports, for where vLLM is not installed. The real one is met by
`make conformance-vllm`.

Requests and features have the attributes that the connector reads of vLLM's own.
"""

from __future__ import annotations

import enum
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

BASE = "vllm.distributed.ec_transfer.ec_connector.base"
UTILS = "vllm.distributed.ec_transfer.ec_connector.utils"
PLATFORMS = "vllm.platforms"
CONNECTOR = "engines.ec_connector.vllm"


class Role(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


class Metadata:
    pass


class Base:
    def __init__(self, vllm_config: Any, role: Role) -> None:
        self._connector_metadata: Metadata | None = None
        self._is_producer = vllm_config.ec_transfer_config.is_ec_producer
        self._is_consumer = vllm_config.ec_transfer_config.is_ec_consumer

    @property
    def is_producer(self) -> bool:
        return bool(self._is_producer)

    @property
    def is_consumer(self) -> bool:
        return bool(self._is_consumer)

    def bind_connector_metadata(self, metadata: Metadata) -> None:
        self._connector_metadata = metadata

    def _get_connector_metadata(self) -> Metadata:
        assert self._connector_metadata is not None
        return self._connector_metadata


class Resolver:
    def __init__(self, model_config: Any) -> None:
        pass

    def fields_for(self, modality: str) -> set[str]:
        return {f"{modality}_grid_thw"}


@dataclass
class Position:
    offset: int
    length: int

    def get_num_embeds(self) -> int:
        return self.length


@dataclass
class Feature:
    """One item. `data` as of one whose media stayed away."""

    identifier: str
    mm_position: Position
    modality: str = "image"
    data: dict[str, Any] | None = field(default_factory=lambda: {"image_grid_thw": [1, 4, 4]})


@dataclass
class Request:
    request_id: str
    mm_features: list[Feature]
    ec_transfer_params: dict[str, Any] | None = None


def collect(mm_features: Sequence[Feature], resolver: Resolver) -> dict[str, dict[str, Any]]:
    items: dict[str, dict[str, Any]] = {}
    for index, feature in enumerate(mm_features):
        entry = items.setdefault(feature.identifier, {"item_indices": []})
        kept = resolver.fields_for(feature.modality)
        entry["metadata"] = {key: value for key, value in (feature.data or {}).items() if key in kept}
        entry["item_indices"].append(index)
    return items


def config(*, producer: bool = False, consumer: bool = False, hidden: int = 16, levels: int = 0, **extra: Any) -> Any:
    """What vLLM hands to a connector. `extra`: ec_connector_extra_config."""
    vision = SimpleNamespace(deepstack_visual_indexes=list(range(levels)))
    return SimpleNamespace(
        ec_transfer_config=SimpleNamespace(
            is_ec_producer=producer, is_ec_consumer=consumer, ec_connector_extra_config=extra
        ),
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(vision_config=vision),
            get_inputs_embeds_size=lambda: hidden,
            dtype=torch.float32,
        ),
        parallel_config=SimpleNamespace(rank=0),
    )


@contextmanager
def installed() -> Iterator[Any]:
    """The connector's module, imported against this."""
    contents: dict[str, dict[str, Any]] = {
        BASE: {"ECConnectorBase": Base, "ECConnectorMetadata": Metadata, "ECConnectorRole": Role},
        UTILS: {"PlaceholderMetadataResolver": Resolver, "collect_ec_item_metadata": collect},
        PLATFORMS: {"current_platform": SimpleNamespace(device_type="cpu")},
    }
    before = dict(sys.modules)
    for name, members in contents.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            sys.modules.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(members)
    sys.modules.pop(CONNECTOR, None)
    try:
        yield importlib.import_module(CONNECTOR)
    finally:
        for name in sys.modules.keys() - before.keys():
            if name == CONNECTOR or name.partition(".")[0] == "vllm":
                del sys.modules[name]
