"""The role of a language engine, and the way to another while it serves. It waits for requests, and runs none.

serving ──switch──▶ draining ──all over──▶ serving, in the new role
                        └──the time is up, or nobody waits any more──▶ serving, in the old one
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from engines.errors import BadRequest, DeadlineExceeded, OtherRole
from engines.language import descriptors
from engines.language.descriptors import Plan

log = logging.getLogger(__name__)

ROLES = tuple(descriptors.ROLES)


def asked(body: Mapping[str, Any], most: float) -> tuple[str, float]:
    """The role that POST /role names, and the seconds that it may take: `timeout`, up to `most`. Raises BadRequest."""
    role, seconds = body.get("role"), body.get("timeout", most)
    if role not in ROLES:
        raise BadRequest(f"role must be one of {', '.join(ROLES)}, got {role!r}", param="role")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise BadRequest(f"timeout must be a number of seconds, got {seconds!r}", param="timeout")
    return role, min(seconds, most)


class Roles:
    """What this engine is, was and becomes. Loop only.

    now:        the role it has.
    started_as: the role that it had first.
    next:       the role that it is on its way to; None while it is on no way.
    """

    def __init__(self, role: str, settled: Callable[[], Awaitable[None]]) -> None:
        """`settled` returns when nothing is owed to other engines any more."""
        self.now = self.started_as = role
        self.next: str | None = None
        self.in_flight = 0
        self._settled = settled
        self._idle = asyncio.Event()
        self._idle.set()
        self._switched = False

    def __repr__(self) -> str:
        way = "" if self.next is None else f" on its way to {self.next}"
        return f"<Roles {self.now}{way}, {self.in_flight} in flight>"

    @property
    def stage(self) -> str:
        """The stage that it answers for."""
        return "prefill" if self.now == "prefill" else "decode"

    @contextmanager
    def serving(self) -> Iterator[None]:
        """A request: the role stays within. Raises OtherRole while the engine drains for another one."""
        if self.next is not None:
            raise OtherRole(f"this engine turns from {self.now} to {self.next}: send the request to another")
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    def plan(self, params: Any) -> Plan:
        """What to do with a request's KV. Raises BadRequest, and OtherRole for what an earlier role may have done: the
        sender has not heard of the switch yet."""
        try:
            return descriptors.read(params, self.now)
        except BadRequest as error:
            if error.code != descriptors.WRONG_ROLE or not self._switched:
                raise
            meant = "decode" if self.stage == "prefill" else "prefill"  # whom its sender has to replace
            raise OtherRole(error.message, param=error.param, stage=meant) from None

    async def switch(self, role: str, seconds: float) -> None:
        """Refuse what is new until all in flight is over and handed over, and have the role `role` from then on. At
        once if it is that already. Whatever else ends this leaves the role as it was.

        Raises OtherRole if the engine is on its way to a role already, DeadlineExceeded after `seconds`.
        """
        if self.next is not None:
            raise OtherRole(f"this engine turns from {self.now} to {self.next} already")
        if role == self.now:
            return
        async with self._draining(role):
            try:
                async with asyncio.timeout(seconds):
                    await self._idle.wait()
                    await self._settled()
            except TimeoutError:
                raise DeadlineExceeded(
                    f"{self.in_flight} requests, or what other engines had to read of them, were not over within "
                    f"{seconds:g} s (--switch-timeout): this engine is {self.now} still",
                    code="switch_timeout",
                ) from None
            log.info("this engine is %s from now on, and was %s", role, self.now)
            self.now, self._switched = role, True

    @asynccontextmanager
    async def _draining(self, role: str) -> AsyncIterator[None]:
        log.info("turning from %s to %s: %d requests are in flight", self.now, role, self.in_flight)
        self.next = role
        try:
            yield
        finally:
            self.next = None
            if self.now != role:
                log.warning("not turned to %s: this engine is %s still", role, self.now)
