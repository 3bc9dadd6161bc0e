"""A client of Mooncake Store in a process of its own. It knows no embedding: keys, numbers and bytes of the slab.

    python -m engines.store.client MASTER HOST PROTOCOL SLAB_FD SLAB_BYTES

Mooncake's calls block for as long as 30 s, and one that failed may still touch its buffer later. Here neither hurts:
whoever asked kills this process, and nothing of it is left. It ends by itself when its standard input does.

In: a `Question` a line. Out: an `Answer` a line, in any order; before all others LOADED and, once the master has
answered, CONNECTED. A result is Mooncake's own: bytes, or an error below 0.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, Literal

import msgspec

LOADED, CONNECTED, FIRST_QUESTION = 0, 1, 2
READERS = 4

Verb = Literal["size", "get", "put", "remove"]


class Question(msgspec.Struct, frozen=True):
    """`offset` and `nbytes`: of the slab, for get and put."""

    id: int
    verb: Verb
    key: str
    offset: int = 0
    nbytes: int = 0


class Answer(msgspec.Struct, frozen=True):
    """`text`: why, where the result alone does not say it."""

    id: int
    result: int
    text: str = ""


def verbs(store: Any, slab: int) -> dict[Verb, Callable[[Question], int]]:
    """What each question asks of a MooncakeDistributedStore. `slab`: its address."""
    return {
        "size": lambda question: int(store.get_size(question.key)),
        "get": lambda question: int(store.get_into(question.key, slab + question.offset, question.nbytes)),
        "put": lambda question: int(store.put_from(question.key, slab + question.offset, question.nbytes)),
        "remove": lambda question: int(store.remove(question.key, True)),  # whoever reads it checks what it gets
    }


def load(protocol: str) -> Any:
    """The library's store class, whose settings it reads from the environment. Raises ImportError."""
    settings = {
        "MC_FORCE_HCA" if protocol == "rdma" else "MC_FORCE_TCP": "1",
        "MC_TCP_ENABLE_CONNECTION_POOL": "1",
        "MC_STORE_CLIENT_SETUP_RETRIES": "1",  # whoever started this process tries again
        "MC_LOG_LEVEL": "ERROR",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)  # noqa: TID251 - the library has no other way to be told
    from mooncake.store import MooncakeDistributedStore

    return MooncakeDistributedStore


class _Answers:
    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._lock = threading.Lock()

    def __call__(self, id: int, result: int, text: str = "") -> None:
        with self._lock:
            self._out.write(msgspec.json.encode(Answer(id, result, text)) + b"\n")
            self._out.flush()


def _connect(make: Any, slab: mmap.mmap, answer: _Answers, work: dict[Verb, Callable[[Question], int]]) -> None:
    """Fill `work`, and say how it went."""
    master, host, protocol = sys.argv[1:4]
    store, address = make(), ctypes.addressof(ctypes.c_char.from_buffer(slab))
    result = store.setup(host, "P2PHANDSHAKE", 0, 0, protocol, "", master)
    result = result or store.register_buffer(address, len(slab))
    work.update(verbs(store, address))
    answer(CONNECTED, result, "" if result == 0 else "its master does not answer")


def _serve(question: Question, work: Mapping[Verb, Callable[[Question], int]], answer: _Answers) -> None:
    answer(question.id, work[question.verb](question))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine, which ends us
    answer = _Answers(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # what the library prints is no answer
    try:
        make = load(sys.argv[3])
    except ImportError as error:
        answer(LOADED, -1, str(error))
        return
    answer(LOADED, 0)
    slab = mmap.mmap(int(sys.argv[4]), int(sys.argv[5]))
    work: dict[Verb, Callable[[Question], int]] = {}
    threading.Thread(target=_connect, args=(make, slab, answer, work), daemon=True).start()
    reading, writing = ThreadPoolExecutor(READERS), ThreadPoolExecutor(1)
    for line in sys.stdin.buffer:
        question = msgspec.json.decode(line, type=Question)
        pool = writing if question.verb == "put" else reading
        pool.submit(_serve, question, work, answer)
    os._exit(0)  # not through the library's destructors, which wait


if __name__ == "__main__":
    main()
