"""The process around an engine: event loop, signals, the READY line, shutdown. It knows no route and no tensor.

An engine is an object with the attributes of `engines.http.Engine`, made by an async context manager that starts
what it needs and ends it:

    @asynccontextmanager
    async def build(settings: EncoderSettings) -> AsyncIterator[Engine]:
        app = await Encoder.start(settings)          # load in a thread: asyncio.to_thread
        try:
            yield app
        finally:
            await app.close()                        # bounded; /dev/shm is clean afterwards

    if __name__ == "__main__":
        serve(EncoderSettings, lambda settings: build, prog="triptych encoder")

`serve` parses the flags, imports what the engine is made of, runs uvloop, prints `READY http://127.0.0.1:PORT` once
requests are answered, and registers at the proxies of --register. On SIGTERM or SIGINT it first has those send it
nothing more, answers new requests with 503, gives those in flight and `Engine.drain()` together `--grace` seconds,
leaves the context manager and exits 0. A second signal, or one before READY, ends it at once, cleanly too once the
event loop runs. Status 2: it could not start, with the reason (`SetupError`) and no traceback. Status 1: it could not
go on (`Fatal`, raised within the context), likewise.

Tests run an engine in their own loop: `async with running(engine, settings) as url`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeVar

import uvloop
from aiohttp import web

from engines import tls
from engines.errors import Fatal, SetupError
from engines.http import Engine, Scaffold, request_id
from engines.register import registered
from engines.settings import WILDCARDS, EngineSettings, load

log = logging.getLogger(__name__)

SWITCH_INTERVAL = 0.0005
"""Seconds for which a thread may keep the GIL from others. Model, loop and senders take turns; with Python's 5 ms a
sender that copies 1000 blocks would wait 5 ms for the model thread again and again."""

SettingsT = TypeVar("SettingsT", bound=EngineSettings)
Build = Callable[[SettingsT], AbstractAsyncContextManager[Engine]]
Find = Callable[[SettingsT], Build[SettingsT]]
"""Imports what an engine needs and gives its `build`: torch and transformers take seconds, --help must not."""


@asynccontextmanager
async def running(engine: Engine, settings: EngineSettings) -> AsyncIterator[str]:
    """The engine's server in this loop; yields its URL. On leaving, requests in flight get --grace seconds."""
    scaffold = Scaffold(engine, settings)
    # Grace is given by `drain`; what is left then is cancelled, and has these seconds to clean up.
    runner = web.AppRunner(scaffold.application(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        yield await _listen(runner, settings)
        await scaffold.drain()
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, settings: EngineSettings) -> str:
    context = tls.listener(settings)
    try:
        await web.TCPSite(runner, settings.host, settings.port, backlog=1024, ssl_context=context).start()
    except OSError as error:
        reason = f"cannot serve on {settings.host}:{settings.port}: {error.strerror or error}"
        raise SetupError(f"{reason}; choose another --host or --port") from None
    host = "127.0.0.1" if settings.host in WILDCARDS else settings.host
    port = runner.addresses[0][1]
    return f"{'http' if context is None else 'https'}://{f'[{host}]' if ':' in host else host}:{port}"


async def _main(settings: SettingsT, build: Build[SettingsT]) -> None:
    loop = asyncio.get_running_loop()
    me = asyncio.current_task()
    assert me is not None
    stop = asyncio.Event()
    ready = False

    def on_signal(number: int) -> None:
        log.info("%s: shutting down", signal.Signals(number).name)
        if stop.is_set() or not ready:
            me.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    async with build(settings) as engine, running(engine, settings) as url:
        ready = True
        print(f"READY {url}", flush=True)
        async with registered(settings, lambda: engine.role, url):
            await stop.wait()


class _RequestIdFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id()
        return True


def _log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler()
    handler.addFilter(_RequestIdFilter())
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"))
    logging.captureWarnings(True)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _found(find: Find[SettingsT], settings: SettingsT) -> Build[SettingsT]:
    """What `find` gives. The garbage collector does not look through what that imports: a million objects that stay,
    in which a tenth of the start and, later, tenths of a second at once would go."""
    gc.disable()
    try:
        return find(settings)
    finally:
        gc.freeze()
        gc.enable()


def serve(cls: type[SettingsT], find: Find[SettingsT], *, prog: str, argv: list[str] | None = None) -> None:
    """Run an engine until a signal ends it, or its own failure. Exits the process: 0 after a signal, 2 when it cannot
    start, 1 when it cannot go on.
    """
    try:
        settings = load(cls, sys.argv[1:] if argv is None else argv, prog=prog)
        _log_to_stderr(settings.log_level)
        build = _found(find, settings)
        sys.setswitchinterval(SWITCH_INTERVAL)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_main(settings, build))
    except (asyncio.CancelledError, KeyboardInterrupt):
        sys.exit(0)
    except SetupError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        sys.exit(2)
    except Fatal as error:
        print(f"{prog}: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
