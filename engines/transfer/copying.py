"""Copying moves between two mappings of this process.

`ctypes.memmove` releases the GIL for each call, so the model thread computes while bytes move. Measured on 2 cores,
16 MiB in one piece: memmove 1.3 ms, numpy.copyto 1.3 ms, torch copy_ 1.4 ms; 1000 × 16 KiB scattered: memmove in a
loop 2.7 ms, process_vm_writev to ourselves (one call) 3.3 ms, numpy fancy indexing 3.4 ms, torch index ops 40 ms.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np

from engines.transfer.plane import Halt
from engines.transfer.spans import Moves

PIECE = 8 << 20
ROWS = 512
"""A look at `halt` comes after so many bytes or moves: a few milliseconds."""


def address_of(buffer: memoryview) -> int:
    """Where a writable buffer begins; valid as long as somebody holds the buffer."""
    return ctypes.addressof((ctypes.c_char * buffer.nbytes).from_buffer(buffer))


def copy(source: int, target: int, moves: Moves, halt: Halt) -> None:
    """Copy moves from the mapping at `source` to the one at `target`; raises what `halt.check` raises."""
    memmove = ctypes.memmove
    for rows in _looks(moves + np.array([source, target, 0], dtype=np.int64)):
        halt.check()
        for start, to, length in rows:
            memmove(to, start, length)


def _looks(moves: Moves) -> Iterator[list[list[int]]]:
    """Rows to copy between two looks."""
    if not len(moves) or int(moves[:, 2].max()) * ROWS <= PIECE or int(moves[:, 2].sum()) <= PIECE:
        for first in range(0, len(moves), ROWS):
            yield moves[first : first + ROWS].tolist()
        return
    for start, to, length in moves.tolist():
        for done in range(0, length, PIECE):
            yield [[start + done, to + done, min(PIECE, length - done)]]
