"""Memory that the workers of one proxy share, and the locks on it. What is written there is other modules' business.

It has no name: nothing appears in /dev/shm, and it is gone with the last process that holds it, however that died.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager


class Segment:
    """A mapping inherited by forked workers, or opened by whoever is given the descriptor.

    Locks are the kernel's record locks: each belongs to a process, and a killed process has let go of them.
    """

    def __init__(self, fd: int) -> None:
        """Map the whole memory behind `fd`, which is this object's from now on."""
        self.fd = fd
        self._mapping = mmap.mmap(fd, 0)
        self.buffer = memoryview(self._mapping)

    @classmethod
    def create(cls, nbytes: int) -> Segment:
        """New memory, all zeros."""
        fd = os.memfd_create("triptych")
        os.ftruncate(fd, nbytes)
        return cls(fd)

    @contextmanager
    def locked(self, number: int) -> Iterator[None]:
        """Lock `number` is held within: for microseconds, with no await. Not to be nested."""
        fcntl.lockf(self.fd, fcntl.LOCK_EX, 1, number)
        try:
            yield
        finally:
            fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, number)

    def claim(self, number: int) -> bool:
        """Take lock `number` until `disclaim` or this process's end, unless another process has it."""
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def disclaim(self, number: int) -> None:
        """Let go of lock `number`; harmless if it is not held."""
        fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, number)

    def close(self) -> None:
        """Let go of it, locks included. Every view of `buffer` must have been released."""
        self.buffer.release()
        self._mapping.close()
        os.close(self.fd)
