"""The command's life: a proxy in this process, or a supervisor with workers; what signals mean to them."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from contextlib import suppress
from functools import partial

import uvloop

from proxy.app import Proxy, local_url
from proxy.joining.membership import Membership
from proxy.reloading import Configuration
from proxy.tasks import together
from proxy.telemetry import tally
from proxy.workers.crew import Crew, Seat
from proxy.workers.supervisor import Reload, Supervisor, reserve

log = logging.getLogger(__name__)

_LOOK_S = 1.0  # how often another configuration is looked for
_GC_THRESHOLD = 20_000  # objects; Python's own 700 are a few requests


async def run(configuration: Configuration, seat: Seat | None = None) -> None:
    """Serve until SIGTERM or SIGINT, or a worker's supervisor is gone. Raises OSError if the address cannot be had."""
    stop, hangup = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, hangup.set)
    if seat is None:
        tally.install_alone()
        look, pause = partial(_look, configuration), _LOOK_S if configuration.watched else None
    else:
        seat.watch(stop.set)
        look, pause = partial(_follow, configuration, seat), None
        hangup.set()  # it may have begun in the middle of a reload
    proxy = Proxy(configuration.settings, seat, configuration.secrets)
    proxy.metrics.also(configuration.reloads)
    async with proxy.serving(configuration.settings.start_delay), together() as group:
        reloading = group.create_task(_reload(proxy, configuration, look, hangup, pause))
        if seat is None:
            _say_ready(proxy.url)
        else:
            seat.ready()
        _spare_collections()
        await stop.wait()
        reloading.cancel()


async def _reload(
    proxy: Proxy, configuration: Configuration, look: Reload, hangup: asyncio.Event, pause: float | None
) -> None:
    """For ever: have `proxy` go by what `look` finds, on `hangup` and every `pause` seconds. Reading takes
    milliseconds, in which streams go on."""
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await hangup.wait()
        asked = hangup.is_set()
        hangup.clear()
        if await asyncio.to_thread(look, asked):
            logging.getLogger().setLevel(configuration.settings.log_level.upper())
            try:
                proxy.go_by(configuration.settings)
            except ValueError as error:
                log.error("not all of the new configuration is in force: %s", error)


def _look(configuration: Configuration, asked: bool) -> bool:
    return configuration.reload() if asked else configuration.look()


def _follow(configuration: Configuration, seat: Seat, asked: bool) -> bool:
    """What the supervisor has taken."""
    text = seat.published() if asked else None
    if text is None:
        return False
    configuration.follow(text)
    return True


def supervise(configuration: Configuration) -> int:
    """Serve with several workers until SIGTERM or SIGINT; the exit status. Raises OSError as `run` does."""
    settings = configuration.settings
    held = reserve(settings.host, settings.port)
    port = held[0].getsockname()[1]
    admin_port = None
    if settings.admin_port is not None:
        administered = reserve(settings.admin_host or settings.host, settings.admin_port)
        held, admin_port = [*held, *administered], administered[0].getsockname()[1]
    crew = Crew.create(settings.workers)
    configuration.count(crew.reloads())
    Membership(crew.fleet(), crew.heartbeats()).configure(settings.fleet())

    def work(seat: Seat) -> None:
        seat.admin_port = admin_port
        tally.install(seat.folder, seat.worker)
        uvloop.run(run(configuration, seat))
        seat.leave()

    def ready() -> None:
        _say_ready(local_url(settings.host, port, "http" if settings.tls_cert is None else "https"))

    def grace() -> float:
        return configuration.settings.drain_delay + configuration.settings.grace_timeout

    def reload(asked: bool) -> bool:
        taken = _look(configuration, asked)
        if taken:
            crew.publish(configuration.text)
        return taken

    try:
        return Supervisor(crew, port, work, ready, grace, reload).run()
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
