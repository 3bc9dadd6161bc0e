"""SGLang's embedding metadata as the pickle that its servers read, written without SGLang. Nothing is unpickled here.

    GLOBAL EmbeddingData │ () │ NEWOBJ │ { name: value … } │ BUILD │ STOP

Each value is a pickle of its own in protocol 2, whose memo is numbered: what a later value writes over, no earlier one
still reads. Classes are named and not imported. Read in SGLang 0.5.10 and 0.5.23, whose allow-lists admit all of it.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_OLD = "sglang.srt.disaggregation.encode_receiver"
_NEW = "sglang.srt.disaggregation.encoder.receiver"
_MODALITY = "sglang.srt.managers.schedule_batch"  # every version finds it there
_MODALITIES = {"IMAGE": 1, "VIDEO": 2, "AUDIO": 3}


@dataclass(frozen=True, slots=True)
class Global:
    """An object of an enumeration that is not here: `module.name(value)`."""

    module: str
    name: str
    value: int


def modality(name: str) -> Global:
    """Raises KeyError for a name that SGLang does not have."""
    return Global(_MODALITY, "Modality", _MODALITIES[name.upper()])


def embedding_data(fields: Mapping[str, Any], new: bool) -> bytes:
    """`EmbeddingData` with these attributes, `new`: as from 0.5.19 on. Values are plain, torch's, or a Global."""
    found = [_global(_NEW if new else _OLD, "EmbeddingData"), pickle.EMPTY_TUPLE, pickle.NEWOBJ]
    found += [pickle.EMPTY_DICT, pickle.MARK]
    for name, value in fields.items():
        found += [_value(name), _value(value)]
    return b"".join([pickle.PROTO, b"\x02", *found, pickle.SETITEMS, pickle.BUILD, pickle.STOP])


def _value(value: Any) -> bytes:
    if isinstance(value, Global):
        return _global(value.module, value.name) + _value(value.value) + pickle.TUPLE1 + pickle.REDUCE
    return pickle.dumps(value, 2)[2:-1]


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
