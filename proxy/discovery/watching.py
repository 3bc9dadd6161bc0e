"""Runs the finders of all names, and sees to heartbeats that have stopped. In one process of a proxy at a time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial

from proxy.discovery.base import Finder, Unreadable
from proxy.joining.membership import Membership
from proxy.settings.endpoint import Endpoint
from proxy.tasks import together

log = logging.getLogger(__name__)

_LOOK_S = 0.25
_STALL_S = 1.0  # so much later than meant, this process has slept: heartbeats may wait unread as long
_PAUSES_S = 1.0, 30.0  # after a failure: the first, and what doubling leads to


class Discovery:
    """Names come and go with the configuration: whoever runs follows `Membership.finders`."""

    def __init__(
        self,
        membership: Membership,
        finder: Callable[[str], Finder],
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`finder` by its word; `wake` is called when the fleet has changed."""
        self._membership = membership
        self._finder = finder
        self._wake = wake
        self._clock = clock
        self._unreadable: dict[str, str] = {}  # why, by source

    def __repr__(self) -> str:
        return f"<Discovery of {len(self._membership.finders)} names, not readable: {self._unreadable}>"

    async def run(self) -> None:
        """For ever."""
        running: dict[str, tuple[Endpoint, asyncio.Task[None]]] = {}
        looked = self._clock()
        async with together() as group:
            while True:
                wanted = {source: endpoint for source, (_, endpoint) in self._membership.finders.items()}
                for source, (endpoint, task) in [*running.items()]:
                    if wanted.get(source) != endpoint:
                        task.cancel()
                        del running[source]
                for source in wanted.keys() - running.keys():
                    task = group.create_task(self._follow(source, wanted[source]))
                    running[source] = wanted[source], task
                now = self._clock()
                if (slept := now - looked) > _STALL_S:
                    self._membership.excuse(slept)
                if self._membership.expire(now):
                    self._wake()
                looked = now
                await asyncio.sleep(_LOOK_S)

    async def _follow(self, source: str, endpoint: Endpoint) -> None:
        finder = self._finder(endpoint.finder)
        pause, longest = _PAUSES_S
        while True:
            try:
                await finder.watch(endpoint, partial(self._found, source))
                pause = _PAUSES_S[0]
            except Unreadable as error:
                if self._unreadable.get(source) != str(error):
                    self._unreadable[source] = str(error)
                    log.warning("%s cannot be read, and counts as it was: %s", source, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)

    def _found(self, source: str, netlocs: Iterable[str]) -> None:
        if self._unreadable.pop(source, None) is not None:
            log.info("%s can be read again", source)
        if self._membership.found(source, netlocs):
            self._wake()
