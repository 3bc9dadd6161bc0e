"""The command's life: a proxy in this process, or a supervisor with workers; what signals mean to them."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys

import uvloop

from proxy import tally
from proxy.app import Proxy, local_url
from proxy.crew import Crew, Seat
from proxy.membership import Membership
from proxy.settings import ProxySettings
from proxy.workers import Supervisor, reserve

log = logging.getLogger(__name__)

_GC_THRESHOLD = 20_000  # objects; Python's own 700 are a few requests


async def run(settings: ProxySettings, seat: Seat | None = None) -> None:
    """Serve until SIGTERM or SIGINT, or a worker's supervisor is gone. Raises OSError if the address cannot be had."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if seat is None:
        tally.install_alone()
    else:
        seat.watch(stop.set)
    proxy = Proxy(settings, seat)
    async with proxy.serving():
        if seat is None:
            _say_ready(proxy.url)
        else:
            seat.ready()
        _spare_collections()
        await stop.wait()
        log.info("stopping; requests in flight have %.0f s", settings.grace_timeout)


def supervise(settings: ProxySettings) -> int:
    """Serve with several workers until SIGTERM or SIGINT; the exit status. Raises OSError as `run` does."""
    held = reserve(settings.host, settings.port)
    port = held[0].getsockname()[1]
    crew = Crew.create(settings.workers)
    Membership(crew.fleet(), crew.heartbeats()).configure(settings.fleet())

    def work(seat: Seat) -> None:
        tally.install(seat.folder, seat.worker)
        uvloop.run(run(settings, seat))
        seat.leave()

    def ready() -> None:
        _say_ready(local_url(settings.host, port))

    try:
        return Supervisor(crew, port, work, ready, settings.grace_timeout).run()
    finally:
        crew.remove()
        for sock in held:
            sock.close()


def _say_ready(url: str) -> None:
    print(f"READY {url}", flush=True, file=sys.stdout)


def _spare_collections() -> None:
    """What is there when serving begins stays: no collection need look at it, and few need to begin.

    Requests leave next to no cycles; a full pass over the modules took 25 ms, in the middle of somebody's stream.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD, 20, 20)
