"""Who holds how much load where. Load enters by a lease and leaves with it, whatever happened; nothing is chosen here.

The unit is predicted tokens. One invariant, checked in every test: an instance's load is the sum of its open leases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import TracebackType

from proxy.core import Instance, Role

Listener = Callable[[Role, str, int], None]


class Lease:
    """One leg's load on one instance, held by `with`. Closing twice is harmless: it is returned once."""

    __slots__ = ("_ledger", "instance", "role", "tokens")

    def __init__(self, ledger: Ledger, instance: Instance, role: Role, tokens: int) -> None:
        self._ledger = ledger
        self.instance = instance
        self.role = role
        self.tokens = tokens

    def __repr__(self) -> str:
        return f"<Lease {self.role.label} {self.instance.netloc} {self.tokens}>"

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._ledger._return(self)


class Ledger:
    """Single-threaded: every method is called on the event loop and none awaits."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._open: set[Lease] = set()
        self._loads: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Ledger {len(self._open)} leases, {dict(self._loads)}>"

    def lease(self, instance: Instance, role: Role, tokens: int) -> Lease:
        """Charge `tokens` (> 0) to `instance` until the lease is closed."""
        if tokens <= 0:
            raise ValueError(f"a lease of {tokens} tokens cannot be told from none")
        lease = Lease(self, instance, role, tokens)
        self._open.add(lease)
        self._move(lease, tokens)
        return lease

    def _return(self, lease: Lease) -> None:
        if lease in self._open:
            self._open.remove(lease)
            self._move(lease, -lease.tokens)

    def _move(self, lease: Lease, tokens: int) -> None:
        key = lease.instance.url
        self._loads[key] += tokens
        load = self._loads[key]
        if load == 0:
            del self._loads[key]
        self._listener(lease.role, key, load)

    def load(self, url: str) -> int:
        """Predicted tokens in work at this instance."""
        return self._loads.get(url, 0)

    def leases(self, *, url: str | None = None, role: Role | None = None) -> int:
        """How many leases are open, of this instance and this role where given."""
        return sum(1 for lease in self._open if url in (None, lease.instance.url) and role in (None, lease.role))

    def check(self) -> None:
        """Raises AssertionError unless the loads are exactly the sums of the open leases."""
        sums: Counter[str] = Counter()
        for lease in self._open:
            sums[lease.instance.url] += lease.tokens
        if sums != self._loads or any(load <= 0 for load in self._loads.values()):
            raise AssertionError(f"loads {dict(self._loads)} are not the sums of the open leases {dict(sums)}")
