"""Certificates for what listens and for what calls, read again while serving. Opens no socket.

Both sides speak TLS 1.2 or later. Whoever is connected when files are read again stays connected.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from proxy.http.client import system_trust


@dataclass(frozen=True, slots=True)
class Files:
    """PEM files: our certificate with its chain, its key, and the authorities that the other side's must come from."""

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None


class Listener:
    """A server's side. It listens with `context` for good; a connection gets what was read last.

    Clients need a certificate of their own where the files name authorities.
    """

    def __init__(self, files: Files) -> None:
        """Raises ValueError naming the file at fault."""
        self._files = files
        self._latest = _listening(files)
        self.context = _listening(files)
        self.context.sni_callback = self._switch  # OpenSSL calls it for every client, with or without a name

    def __repr__(self) -> str:
        return f"<Listener {self._files.cert}>"

    def reread(self) -> None:
        """Raises ValueError naming the file at fault: what was read before stays."""
        self._latest = _listening(self._files)

    def _switch(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._latest


class Connector:
    """A client's side: `context` is for the next connection. Without authorities it trusts those of the system."""

    def __init__(self, files: Files) -> None:
        """Raises ValueError naming the file at fault."""
        self._files = files
        self.context = _calling(files)

    def __repr__(self) -> str:
        return f"<Connector {self._files.cert}>"

    def reread(self) -> None:
        """Raises ValueError naming the file at fault: what was read before stays."""
        self.context = _calling(self._files)


@dataclass(frozen=True, slots=True)
class Certificates:
    """All that a proxy shows. None: it speaks plainly there, or trusts whom the system trusts."""

    clients: Listener | None = None
    admins: Listener | None = None  # who have a key, and so need no certificate
    engines: Connector | None = None

    @property
    def scheme(self) -> str:
        """Of the URLs that lead here."""
        return "http" if self.clients is None else "https"

    def reread(self) -> None:
        """Raises ValueError naming the file at fault."""
        for one in (self.clients, self.admins, self.engines):
            if one is not None:
                one.reread()

    def trust(self) -> ssl.SSLContext:
        """For the next call of an https engine."""
        return system_trust() if self.engines is None else self.engines.context


def _listening(files: Files) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    _show(context, files)
    if files.ca is not None:
        with _named(files.ca):
            context.load_verify_locations(files.ca)
        context.verify_mode = ssl.CERT_REQUIRED
        # A resumed session is not verified again: it would outlive the authority that vouched for it.
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET
    return context


def _calling(files: Files) -> ssl.SSLContext:
    with _named(files.ca):
        context = ssl.create_default_context(cafile=files.ca)
    _show(context, files)
    return context


def _show(context: ssl.SSLContext, files: Files) -> None:
    if files.cert is not None:
        with _named(files.cert, files.key):
            context.load_cert_chain(files.cert, files.key, password=_refuse)


def _refuse() -> str:
    """Instead of OpenSSL, which would ask at the terminal."""
    raise ValueError("the key is encrypted, and nobody is here to be asked for its password")


@contextmanager
def _named(*files: Path | None) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        said = (error.reason or str(error)) if isinstance(error, ssl.SSLError) else getattr(error, "strerror", None)
        raise ValueError(f"{', '.join(map(str, filter(None, files)))}: {said or error}") from None
