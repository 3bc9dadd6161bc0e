"""Moves tensor bytes between engines. Knows no engine, no model, no HTTP.

    transfer = create("shm")
    arena = transfer.allocate("kv", nbytes)
    await transfer.start()

`base` has the contract and the errors; `endpoint` the logic that all transports share; each transport its data plane.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import cast

from engines.transfer.base import Transfer

TRANSPORTS = {
    "shm": "engines.transfer.shm:create",
    "mooncake": "engines.transfer.mooncake:create",
    "zmq": "engines.transfer.zmq:create",
    "storage": "engines.transfer.storage:create",
    "memory": "engines.transfer.memory:create",
}


def create(
    name: str,
    *,
    host: str = "127.0.0.1",
    advertise: str | None = None,
    timeout: float = 5.0,
    rdma: bool = False,
    storage_path: Path | str | None = None,
) -> Transfer:
    """A transfer that is not started yet.

    host: the interface the control channel binds. advertise: the name peers use for it (default: host).
    timeout: seconds for one control round trip with a peer, and for first contact. rdma: demand it (mooncake only).
    storage_path: the shared folder (storage only). Raises ValueError for a bad combination, TransportUnavailable when
    a library is missing.
    """
    if name not in TRANSPORTS:
        raise ValueError(f"unknown transport {name!r}: choose one of {', '.join(TRANSPORTS)}")
    if rdma and name != "mooncake":
        raise ValueError(f"RDMA needs the mooncake transport, not {name}")
    if (storage_path is not None) != (name == "storage"):
        raise ValueError("the storage transport needs a storage path, and no other takes one")
    module, _, factory = TRANSPORTS[name].partition(":")
    make = getattr(import_module(module), factory)
    return cast(
        Transfer,
        make(host=host, advertise=advertise or host, timeout=timeout, rdma=rdma, storage_path=storage_path),
    )
