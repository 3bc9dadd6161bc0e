"""What breaks, and when: engines that die, come back, or slow down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Kill:
    """All in work there fails at once, and every leg sent there until `until` is refused."""

    url: str
    at: float
    until: float | None = None  # when it is up again, empty


@dataclass(frozen=True, slots=True)
class Slow:
    """What begins there takes `times` as long."""

    url: str
    at: float
    times: float
    until: float | None = None


Fault: TypeAlias = Kill | Slow
