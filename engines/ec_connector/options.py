"""The connector's part of `--ec-transfer-config`: `ec_connector_extra_config`. It reads nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

Positive = Annotated[float, msgspec.Meta(gt=0)]
Bytes = Annotated[int, msgspec.Meta(gt=0)]


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All engines that exchange embeddings choose the same `transfer`."""

    transfer: Literal["storage", "shm", "mooncake", "zmq"] = "storage"
    shared_storage_path: str | None = None  # of storage alone; the name that vLLM's example connector uses
    transfer_host: str = "127.0.0.1"  # address of this machine that the other engines can reach
    transfer_timeout: Positive = 30.0  # seconds for one embedding's bytes to move
    rdma: bool = False  # of mooncake alone
    wait_timeout: Positive = 30.0  # seconds for which a request waits for an embedding
    embedding_bytes: Bytes = 256 << 20  # arena that embeddings arrive in, on their way to the shelf
    cache_bytes: Bytes = 512 << 20  # arena that a producer publishes from; storage needs none
    handle_ttl: Positive = 60.0  # seconds that a published embedding stays readable after the last answer that named it
    shelf_path: str = "/dev/shm"  # where the shelf is made; memory, and seen by all workers
    shelf_bytes: Bytes = 1 << 30  # embeddings kept there for later requests; those in use come on top

    @classmethod
    def read(cls, extra_config: Mapping[str, Any]) -> Options:
        """Raises ValueError with what to change."""
        try:
            options = msgspec.convert(extra_config, cls)
        except msgspec.ValidationError as error:
            raise ValueError(f"ec_connector_extra_config: {error}") from None
        if (options.transfer == "storage") != (options.shared_storage_path is not None):
            raise ValueError(
                "ec_connector_extra_config: the transfer storage needs shared_storage_path, no other takes it"
            )
        return options
