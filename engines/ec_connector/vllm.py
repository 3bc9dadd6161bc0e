"""`TriptychECConnector`: vLLM's hooks, each handed on to the side that it runs on. Nothing is decided here.

Written against vLLM 0.32 and 0.33 (`vllm/distributed/ec_transfer/ec_connector/base.py`), for both model runners. vLLM
makes one object per process role and calls the methods of that role alone.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorMetadata, ECConnectorRole
from vllm.distributed.ec_transfer.ec_connector.utils import PlaceholderMetadataResolver, collect_ec_item_metadata
from vllm.platforms import current_platform

from engines.ec_connector.courier import Courier
from engines.ec_connector.options import Options
from engines.ec_connector.scheduler_side import SchedulerSide
from engines.ec_connector.shelf import Shelf
from engines.ec_connector.worker_side import WorkerSide


@dataclass
class StepOrders(ECConnectorMetadata):
    """From the scheduler to the workers, for one step."""

    shelf: str = ""
    loads: list[str] = field(default_factory=list)
    store: str = ""
    saves: list[str] = field(default_factory=list)


class TriptychECConnector(ECConnectorBase):
    def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        options = Options.read(vllm_config.ec_transfer_config.ec_connector_extra_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role is ECConnectorRole.SCHEDULER:
            self._scheduler = self._scheduler_side(vllm_config, options)
        else:
            saves = self.is_producer and vllm_config.parallel_config.rank == 0
            self._worker = WorkerSide(_device(), vllm_config.model_config.dtype, saves=saves)

    def _scheduler_side(self, vllm_config: Any, options: Options) -> SchedulerSide:
        resolver = PlaceholderMetadataResolver(vllm_config.model_config)
        shelf = Shelf.make(Path(options.shelf_path))
        width = _width(vllm_config.model_config)
        courier = Courier(options, shelf, width, receives=self.is_consumer, sends=self.is_producer)
        try:
            courier.start()
        except BaseException:
            shelf.remove()
            raise
        describe = partial(collect_ec_item_metadata, resolver=resolver)
        return SchedulerSide(options, courier, shelf, describe=describe, fields=resolver.fields_for)

    @property
    def _scheduling(self) -> SchedulerSide:
        assert self._scheduler is not None, "called on a worker"
        return self._scheduler

    @property
    def _working(self) -> WorkerSide:
        assert self._worker is not None, "called on the scheduler"
        return self._worker

    @property
    def _orders(self) -> StepOrders:
        orders = self._get_connector_metadata()
        assert isinstance(orders, StepOrders)
        return orders

    # ---- the scheduler's process

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        if self.is_producer:
            self._scheduling.ask(request)
        return not self.is_consumer or self._scheduling.available(request, num_computed_tokens)

    def has_cache_item(self, identifier: str) -> bool:
        return self.is_consumer and self._scheduling.has(identifier)

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        self._scheduling.will_load(request.mm_features[index].identifier)

    def build_connector_meta(self, scheduler_output: Any) -> StepOrders:
        side = self._scheduling
        return StepOrders(side.shelf, side.take_loads(), side.store, side.take_unpublished())

    def take_unavailable_requests(self) -> set[str]:
        return self._scheduling.take_lost()

    def request_finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        self._scheduling.finished(request)
        return False, self._scheduling.published(request) if self.is_producer else None

    # ---- a worker's process

    def start_load_caches(self, encoder_cache: MutableMapping[str, torch.Tensor], **_: Any) -> None:
        self._working.load(encoder_cache, self._orders.shelf, self._orders.loads)

    def start_save_caches(self, **kwargs: Any) -> None:
        self._working.save(kwargs["encoder_cache"], self._orders.store, self._orders.saves)

    def save_caches(self, encoder_cache: MutableMapping[str, torch.Tensor], mm_hash: str, **_: Any) -> None:
        self._working.save(encoder_cache, self._orders.store, [mm_hash])

    # ---- either

    def shutdown(self) -> None:
        if self._scheduler is not None:
            self._scheduler.close()


def _device() -> torch.device:
    """Of this worker: `cuda` alone would mean the first one."""
    kind = current_platform.device_type
    return torch.device(kind, torch.accelerator.current_device_index()) if kind == "cuda" else torch.device(kind)


def _width(model_config: Any) -> int:
    """Columns of an embedding: the hidden size, once more for each deepstack level (Qwen3-VL)."""
    vision = getattr(model_config.hf_config, "vision_config", None)
    levels = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    width: int = model_config.get_inputs_embeds_size() * (1 + levels)
    return width
