"""What the connector does in a vLLM worker: embeddings between the folders and the encoder cache. It asks nobody.

An error in a worker ends the whole engine, hence: what is loaded was checked and is kept by the scheduler's side until
the step is over, and what cannot be saved is only logged; the request's answer then says that it is not published.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, MutableMapping
from pathlib import Path

import torch

from engines.ec_connector.shelf import Shelf

log = logging.getLogger(__name__)

Cache = MutableMapping[str, torch.Tensor]
"""vLLM's encoder cache: mm_hash → [tokens, width] on the worker's device."""


class WorkerSide:
    """`saves`: this worker publishes; where several hold the same embeddings, one does."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, *, saves: bool) -> None:
        self._device, self._dtype, self._saves = device, dtype, saves

    def load(self, cache: Cache, shelf: str, keys: Iterable[str]) -> None:
        folder = Shelf(Path(shelf))
        for key in keys:
            if key not in cache:
                cache[key] = folder.get(key).to(self._device, self._dtype)

    def save(self, cache: Cache, store: str, keys: Iterable[str]) -> None:
        """Those of `keys` that the cache holds."""
        if not self._saves:
            return
        folder = Shelf(Path(store))
        for key in keys:
            if key in cache:
                try:
                    folder.put(key, cache[key])
                except (OSError, ValueError, KeyError) as error:
                    log.warning("cannot save the embedding %s: %s", key, error)
