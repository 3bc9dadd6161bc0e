"""Predicted bytes of embeddings on their way to each instance that reads them, and who has no room for more. Pure."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final


class Cargo:
    """One request's embeddings on their way. Closing twice is harmless."""

    __slots__ = ("_freight", "_nbytes", "_url")

    def __init__(self, freight: Freight, url: str, nbytes: int) -> None:
        self._freight = freight
        self._url = url
        self._nbytes = nbytes

    def close(self) -> None:
        """They have arrived, or will not."""
        self._freight._sent(self._url, -self._nbytes)
        self._nbytes = 0


class Freight:
    """Counts in one process."""

    def __init__(self, most: int | None = None) -> None:
        """`most`: bytes on their way to one instance; one request alone may have more. None: no bound."""
        self.most: Final = most
        self._underway: dict[str, int] = {}  # bytes > 0, by URL

    def __repr__(self) -> str:
        return f"<Freight {self._underway}>"

    def send(self, url: str, nbytes: int) -> Cargo:
        self._sent(url, nbytes)
        return Cargo(self, url, nbytes)

    def underway(self, url: str) -> int:
        return self._underway.get(url, 0)

    def full(self, nbytes: int) -> Collection[str]:
        """Who has no room for `nbytes` more."""
        most = self.most
        if most is None or not nbytes:
            return ()
        return {url for url, underway in self._underway.items() if underway + nbytes > most}

    def _sent(self, url: str, nbytes: int) -> None:
        left = self._underway.get(url, 0) + nbytes
        if left:
            self._underway[url] = left
        else:
            self._underway.pop(url, None)
