"""Who holds how much load where. Load enters by a lease and leaves with it, whatever happened; nothing is chosen here.

The unit is predicted tokens. One invariant, checked in every test: an instance's load is the sum of its open leases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType

from proxy.balancer.board import Board, Counts, Rows, Standing, alone
from proxy.balancer.pool import Pool
from proxy.core import ROLES, Instance, Role
from proxy.record import Choice

_TOTALS = {role: role.value for role in ROLES}  # the board's row of each role's own totals

Listener = Callable[[str, Standing], None]


class Lease:
    """One leg's load on one instance, held by `with`. Closing twice is harmless: it is returned once."""

    __slots__ = ("_ledger", "also", "choice", "instance", "role", "row", "tokens")

    def __init__(self, ledger: Ledger, instance: Instance, role: Role, tokens: int, row: int) -> None:
        self._ledger = ledger
        self.instance = instance
        self.role = role
        self.tokens = tokens
        self.row = row  # of the board; it stays the instance's while this lease is open
        self.also: Callable[[], None] | None = None  # what else is over when it is returned
        self.choice: Choice | None = None  # how its instance was chosen; None: there was nobody else

    @property
    def others(self) -> int:
        """Predicted tokens in work at its instance now, while it is open, without its own."""
        return self._ledger._board.standing(self.row).load - self.tokens

    def __repr__(self) -> str:
        return f"<Lease {self.role.label} {self.instance.netloc} {self.tokens}>"

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._ledger._return(self)


class Ledger:
    """Single-threaded: every method is called on the event loop and none awaits.

    With a shared board it charges this process's leases, and answers for those of all.
    """

    def __init__(self, listeners: Mapping[Role, Listener], board: Board | None = None) -> None:
        """`listeners` hear of every lease of their role taken and returned here: the instance, as it stands then."""
        self.listeners = listeners
        self._board = board or alone()
        self._open: set[Lease] = set()

    def __repr__(self) -> str:
        return f"<Ledger {len(self._open)} leases, {self._loads()}>"

    @property
    def shared(self) -> bool:
        """Whether other processes charge instances too, of which the listener is not told."""
        return self._board.workers > 1

    def lease(self, instance: Instance, role: Role, tokens: int) -> Lease:
        """Charge `tokens` (> 0) to `instance` until the lease is closed; counts as a use of it."""
        if tokens <= 0:
            raise ValueError(f"a lease of {tokens} tokens cannot be told from none")
        row = self._board.row(instance.url)
        lease = Lease(self, instance, role, tokens, row)
        self._open.add(lease)
        self._board.use(row)
        self._move(lease, tokens, 1)
        return lease

    def _return(self, lease: Lease) -> None:
        if lease in self._open:
            self._open.remove(lease)
            self._move(lease, -lease.tokens, -1)
            if lease.also is not None:
                lease.also()

    def _move(self, lease: Lease, tokens: int, leases: int) -> None:
        self._board.add(lease.row, _TOTALS[lease.role], tokens, leases)
        listener = self.listeners.get(lease.role)
        if listener is not None:
            listener(lease.instance.url, self._board.standing(lease.row))

    def standing(self, url: str) -> Standing:
        """Load and last use of this instance, whoever charged it."""
        return self._board.standing(self._board.row(url))

    def load(self, url: str) -> int:
        """Predicted tokens in work at this instance."""
        return self.standing(url).load

    def loads(self, pool: Pool) -> Counts:
        """The load of each of `pool`, in its order: a new array."""
        return self._board.loads(self._rows(pool))

    def running(self, pool: Pool) -> Counts:
        """How many leases are open on each of `pool`."""
        return self._board.open_leases(self._rows(pool))

    def used(self, pool: Pool) -> Counts:
        """The turn in which each of `pool` was last chosen, 0 for never."""
        return self._board.used(self._rows(pool))

    def _rows(self, pool: Pool) -> Rows:
        known: tuple[int, Rows] | None = pool.kept.get(self)
        if known is None or known[0] != self._board.given_away:
            given_away = self._board.given_away  # finding rows may give others away: then this is done again
            known = pool.kept[self] = given_away, self._board.rows(pool.urls)
        return known[1]

    def leases(self, *, url: str | None = None, role: Role | None = None) -> int:
        """How many leases are open: of this instance, or of this role, or in all."""
        if url is not None:
            return self._board.leases(self._board.row(url))
        return sum(self._board.leases(one.value) for one in (ROLES if role is None else (role,)))

    def check(self) -> None:
        """Raises AssertionError unless what is charged is exactly the sum of this process's open leases."""
        sums: dict[int, tuple[int, int]] = {}
        for lease in self._open:
            for row in (lease.row, lease.role.value):
                load, leases = sums.get(row, (0, 0))
                sums[row] = load + lease.tokens, leases + 1
        if sums != self._board.held():
            raise AssertionError(f"{self!r}: {self._board.held()} is not the sums of the open leases, {sums}")

    def _loads(self) -> dict[str, int]:
        return {lease.instance.url: self.load(lease.instance.url) for lease in self._open}
