"""Copying moves between two mappings of this process.

`ctypes.memmove` releases the GIL for each call, so the model thread computes while bytes move. Measured on 2 cores,
16 MiB in one piece: memmove 1.3 ms, numpy.copyto 1.3 ms, torch copy_ 1.4 ms; 1000 × 16 KiB scattered: memmove in a
loop 2.7 ms, process_vm_writev to ourselves (one call) 3.3 ms, numpy fancy indexing 3.4 ms, torch index ops 40 ms.
"""

from __future__ import annotations

import ctypes

from engines.transfer.plane import Halt
from engines.transfer.spans import Moves

PIECE = 8 << 20
"""Bytes between two looks at `halt`: a few milliseconds."""


def address_of(buffer: memoryview) -> int:
    """Where a writable buffer begins; valid as long as somebody holds the buffer."""
    return ctypes.addressof((ctypes.c_char * buffer.nbytes).from_buffer(buffer))


def copy(source: int, target: int, moves: Moves, halt: Halt) -> None:
    """Copy moves from the mapping at `source` to the one at `target`; raises what `halt.check` raises."""
    unchecked = 0
    memmove = ctypes.memmove
    for start, to, length in moves.tolist():
        done = 0
        while done < length:
            if unchecked >= PIECE:
                halt.check()
                unchecked = 0
            piece = min(length - done, PIECE)
            memmove(target + to + done, source + start + done, piece)
            done += piece
            unchecked += piece
