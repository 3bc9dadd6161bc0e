"""Files that clients name, read only if they lie under allowed folders, whatever links lead there.

Links are resolved first. What was found is then opened from its root on, one folder after the other and following
none, so that nothing which is put in the way meanwhile leads elsewhere.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath

_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # no waiting on a named pipe
_FOLDER = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC


class Outside(Exception):
    """No regular file under a root."""


def read(path: PurePath, roots: Sequence[PurePath], most: int) -> bytes:
    """At most `most` bytes of the file. Blocks. Raises Outside, OSError."""
    real = Path(os.path.realpath(path))
    for root in map(os.path.realpath, roots):
        if real.is_relative_to(root):
            return _read(root, real.relative_to(root).parts, most)
    raise Outside


def _read(root: str, parts: Sequence[str], most: int) -> bytes:
    with _opened(root, parts) as descriptor:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Outside
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(most)


@contextmanager
def _opened(root: str, parts: Sequence[str]) -> Iterator[int]:
    held = [os.open(root, _FOLDER)]
    try:
        for number, part in enumerate(parts, 1):
            held.append(os.open(part, _FILE if number == len(parts) else _FOLDER, dir_fd=held[-1]))
        yield held[-1]
    finally:
        for descriptor in held:
            os.close(descriptor)
