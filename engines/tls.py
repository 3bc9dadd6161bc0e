"""The engine's certificate, and whose it trusts: for its listener, and for its own calls of the proxy.

Files that were replaced are read at the next connection, so that a short-lived certificate can be renewed while
requests run. Bad ones change nothing: what was read before stays in use, and the log says why.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engines.errors import SetupError
from engines.settings import EngineSettings

log = logging.getLogger(__name__)

Signature = tuple[tuple[int, int, int] | None, ...]


class Files:
    """A context made of `files`, made anew when they have changed."""

    def __init__(self, make: Callable[[], ssl.SSLContext], *files: Path | None) -> None:
        """Raises SetupError naming the file at fault."""
        self._make = make
        self._files = [file for file in files if file is not None]
        self._seen = self._signature()
        self._context = make()

    def __repr__(self) -> str:
        return f"<Files {', '.join(map(str, self._files))}>"

    def context(self) -> ssl.SSLContext:
        """For the next connection."""
        if (now := self._signature()) != self._seen:
            self._seen = now
            try:
                self._context = self._make()
            except SetupError as error:
                log.error("what was read before stays in use: %s", error)
        return self._context

    def _signature(self) -> Signature:
        return tuple(map(_stat, self._files))


def listener(settings: EngineSettings) -> ssl.SSLContext | None:
    """What the server listens with for good; None: plainly. Each connection gets what the files hold by then.

    Raises SetupError.
    """
    if settings.tls_cert is None:
        return None
    files = Files(lambda: _listening(settings), settings.tls_cert, settings.tls_key, settings.tls_client_ca)

    def switch(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = files.context()

    context = _listening(settings)
    context.sni_callback = switch  # OpenSSL calls it for every client, with or without a name
    return context


def calls(settings: EngineSettings) -> Files | None:
    """For calls of the proxy; None: as everybody does. Raises SetupError."""
    if settings.proxy_ca is None and settings.tls_cert is None:
        return None
    return Files(lambda: _calling(settings), settings.proxy_ca, settings.tls_cert, settings.tls_key)


def _listening(settings: EngineSettings) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    _show(context, settings)
    if settings.tls_client_ca is not None:
        with _named(settings.tls_client_ca):
            context.load_verify_locations(settings.tls_client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
        # A resumed session is not verified again: it would outlive the authority that vouched for it.
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET
    return context


def _calling(settings: EngineSettings) -> ssl.SSLContext:
    with _named(settings.proxy_ca):
        context = ssl.create_default_context(cafile=settings.proxy_ca)
    _show(context, settings)
    return context


def _show(context: ssl.SSLContext, settings: EngineSettings) -> None:
    if settings.tls_cert is not None:
        with _named(settings.tls_cert, settings.tls_key):
            context.load_cert_chain(settings.tls_cert, settings.tls_key, password=_refuse)


def _refuse() -> str:
    """Instead of OpenSSL, which would ask at the terminal."""
    raise ValueError("the key is encrypted, and nobody is here to be asked for its password")


@contextmanager
def _named(*files: Path | None) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        said = (error.reason or str(error)) if isinstance(error, ssl.SSLError) else getattr(error, "strerror", None)
        raise SetupError(f"{', '.join(map(str, filter(None, files)))}: {said or error}") from None


def _stat(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
