"""One circuit per instance, moved by how its legs end. Pure: the clock is passed in, nothing is probed or sent.

CLOSED ──failures in a row──▶ OPEN ──delay over──▶ HALF_OPEN ──success──▶ CLOSED
                                ◀────── its one trial leg failed ──┘      (each time for twice as long)

Beside it an instance may ask to be left alone until a time (Retry-After), which says nothing bad of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from proxy.retry import Blame

_LONGEST = 8  # times the first delay
_LONGEST_AVOIDANCE_S = 60.0


class Circuit(StrEnum):
    CLOSED = "CLOSED"
    OPEN = "OPEN"
    HALF_OPEN = "HALF_OPEN"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """`failures` in a row open a circuit for `delay` seconds."""

    failures: int = 5
    delay: float = 5.0


@dataclass(slots=True)
class _Record:
    failures: int = 0  # in a row
    trips: int = 0  # in a row
    open_until: float | None = None
    avoid_until: float = 0.0
    trial: Permit | None = None


@dataclass(slots=True, eq=False)
class Permit:
    """One leg's leave to run. Ends once: well, badly, or without a verdict when it is closed."""

    _breakers: Breakers
    url: str
    ended: bool = field(default=False)

    def succeeded(self) -> None:
        self._breakers._end(self, None, 0.0, None)

    def failed(self, blame: Blame, now: float, retry_after: float | None = None) -> bool:
        """True if this opened the circuit."""
        return self._breakers._end(self, blame, now, retry_after)

    def close(self) -> None:
        """A client that left, or an engine that was not to blame, is no verdict."""
        self._breakers._end(self, Blame.NONE, 0.0, None)


class Breakers:
    """The circuits of a fleet by URL. An unknown URL has a closed one."""

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self._records: dict[str, _Record] = {}
        self._restricted: set[str] = set()  # to which not every leg may go, or might not a moment ago

    def __repr__(self) -> str:
        return f"<Breakers {self._records}>"

    def permit(self, url: str) -> Permit:
        """For a leg that begins; the first one after an open circuit's delay is its trial."""
        permit = Permit(self, url)
        record = self._records.setdefault(url, _Record())
        if record.open_until is not None and record.trial is None:
            record.trial = permit
            self._restricted.add(url)
        return permit

    def allows(self, url: str, now: float) -> bool:
        return self.wait(url, now) == 0.0

    def all_allowed(self, now: float) -> bool:
        """Whether a leg may begin anywhere."""
        if self._restricted:
            self._restricted = {url for url in self._restricted if not self.allows(url, now)}
        return not self._restricted

    def wait(self, url: str, now: float) -> float:
        """Seconds until a leg may begin there, at the least; 0 if it may now."""
        record = self._records.get(url)
        if record is None:
            return 0.0
        until = max(record.avoid_until, record.open_until or 0.0)
        if until > now:
            return until - now
        return self.thresholds.delay if record.trial is not None else 0.0

    def circuit(self, url: str, now: float) -> Circuit:
        record = self._records.get(url)
        if record is None or record.open_until is None:
            return Circuit.CLOSED
        return Circuit.OPEN if record.open_until > now else Circuit.HALF_OPEN

    def forget(self, url: str) -> None:
        """It is another process now, or gone."""
        self._records.pop(url, None)

    def _end(self, permit: Permit, blame: Blame | None, now: float, retry_after: float | None) -> bool:
        if permit.ended:
            return False
        permit.ended = True
        record = self._records.get(permit.url)
        if record is None:
            return False
        is_trial = record.trial is permit
        if is_trial:
            record.trial = None
        if blame is None:
            record.failures, record.trips, record.open_until = 0, 0, None
        elif blame is Blame.AVOID:
            if retry_after is not None:
                record.avoid_until = max(record.avoid_until, now + min(retry_after, _LONGEST_AVOIDANCE_S))
                self._restricted.add(permit.url)
        elif blame in (Blame.FAILURE, Blame.DEAD):
            return self._failed(permit.url, record, is_trial, now)
        return False

    def _failed(self, url: str, record: _Record, is_trial: bool, now: float) -> bool:
        record.failures += 1
        if record.open_until is not None and not is_trial:
            return False  # begun before it opened
        if not is_trial and record.failures < self.thresholds.failures:
            return False
        record.open_until = now + self.thresholds.delay * min(2**record.trips, _LONGEST)
        record.trips += 1
        self._restricted.add(url)
        return True
