"""What stands in the store, and under which key. It asks no store.

    | magic, 8 | meta's length, 4 | checksum, 32 | meta … | to the next 64 | rows … |

`meta` says what the rows are, in its writer's words. The checksum is BLAKE3 of key, meta and rows: a record that was
cut, mixed up with another or half overwritten does not open. It is no signature: who can write to the store can lie.

Rows are of one model and one dtype, so both are in the key: the model as its fingerprint, which is the content of its
vision tower and of every file that says how media are cut, and the release of Triptych, which does it. How a checkpoint
is split into files does not matter.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from struct import Struct
from typing import NamedTuple

import torch
from blake3 import blake3

from engines import weights
from engines.ranges import rounded

MAGIC = b"TRIPEMB1"
_HEADER = Struct("<8sI32s")
_CUT_BY = ("config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


class BadRecord(Exception):
    """These bytes are no record of that key."""


class Record(NamedTuple):
    meta: bytes
    rows: memoryview


def key(fingerprint: str, dtype: str, mm_hash: str) -> str:
    """Of one embedding, among all that share a store."""
    return "triptych-" + blake3(f"{MAGIC.decode()} {fingerprint} {dtype} {mm_hash}".encode()).hexdigest()


def fingerprint(folder: Path) -> str:
    """Of the checkpoint in `folder`. Reads its vision tower. Raises WeightsError, OSError, ValueError."""
    tensors = []
    for _, name, tensor in weights.read(folder, "vision"):
        digest = blake3(
            tensor.contiguous().view(-1).view(torch.uint8).numpy().data, max_threads=blake3.AUTO
        ).hexdigest()
        tensors.append([name, str(tensor.dtype), list(tensor.shape), digest])
    files = {name: json.loads((folder / name).read_text()) for name in _CUT_BY if (folder / name).exists()}
    return blake3(json.dumps([version("triptych"), sorted(tensors), files], sort_keys=True).encode()).hexdigest()


def size(meta: bytes, nbytes: int) -> int:
    """Bytes of a record with `nbytes` of rows."""
    return rounded(_HEADER.size + len(meta)) + nbytes


def seal(target: memoryview, key: str, meta: bytes, rows: memoryview) -> None:
    """Write a record into `target`, which has its size."""
    start = rounded(_HEADER.size + len(meta))
    target[start:] = rows
    target[_HEADER.size : _HEADER.size + len(meta)] = meta
    _HEADER.pack_into(target, 0, MAGIC, len(meta), _checksum(key, meta, target[start:]))


def opened(record: memoryview, key: str) -> Record:
    """Views into `record`. Raises BadRecord."""
    if len(record) < _HEADER.size:
        raise BadRecord(f"{len(record)} bytes")
    magic, length, checksum = _HEADER.unpack_from(record)
    start = rounded(_HEADER.size + length)
    if magic != MAGIC or start > len(record):
        raise BadRecord(f"it begins with {magic!r} and {length}")
    meta, rows = bytes(record[_HEADER.size : _HEADER.size + length]), record[start:]
    if _checksum(key, meta, rows) != checksum:
        raise BadRecord("its checksum is another")
    return Record(meta, rows)


def _checksum(key: str, meta: bytes, rows: memoryview) -> bytes:
    return blake3(key.encode() + meta).update(rows).digest()
