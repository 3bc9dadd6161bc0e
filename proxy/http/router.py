"""Which handler answers a method and a path. No patterns: a route is a fixed path, or all that begin with one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from enum import Flag, auto
from typing import TypeAlias

from proxy.http.message import Response
from proxy.http.server import Request

Handler: TypeAlias = Callable[[Request], Awaitable[Response | None]]
"""Its answer, or None where it has answered through the request itself."""


class Audience(Flag):
    """Whom a route is for; where admins have a port of their own, it is the only one that answers them."""

    CLIENTS = auto()
    ADMINS = auto()
    ALL = CLIENTS | ADMINS


@dataclass(frozen=True, slots=True)
class Route:
    method: str
    path: str  # with a slash at its end: all paths that have more behind it, but for those with a route of their own
    handler: Handler
    audience: Audience = Audience.CLIENTS


def get(path: str, handler: Handler, audience: Audience = Audience.CLIENTS) -> Route:
    return Route("GET", path, handler, audience)


def post(path: str, handler: Handler, audience: Audience = Audience.CLIENTS) -> Route:
    return Route("POST", path, handler, audience)


def delete(path: str, handler: Handler, audience: Audience = Audience.CLIENTS) -> Route:
    return Route("DELETE", path, handler, audience)


class NoRoute(Exception):
    """`allowed` holds the methods that the path has; empty: there is no such path."""

    def __init__(self, allowed: frozenset[str]) -> None:
        super().__init__(f"allowed: {', '.join(sorted(allowed))}" if allowed else "no such path")
        self.allowed = allowed


class Router:
    def __init__(self, routes: Iterable[Route], audience: Audience = Audience.ALL) -> None:
        """Finds the `routes` that are for any of `audience`."""
        self._handlers: dict[str, dict[str, Handler]] = {}
        for route in routes:
            if route.audience & audience:
                self._handlers.setdefault(route.path, {})[route.method] = route.handler
        # Those that others begin with, the longest first.
        self._open = sorted((path for path in self._handlers if path.endswith("/")), key=len, reverse=True)

    def find(self, method: str, path: str) -> Handler:
        """A GET handler answers HEAD as well. Raises NoRoute."""
        handlers = self._handlers.get(path)
        if handlers is None or path.endswith("/"):
            handlers = self._under(path)
        handler = handlers.get("GET" if method == "HEAD" else method)
        if handler is None:
            raise NoRoute(frozenset(handlers))
        return handler

    def _under(self, path: str) -> dict[str, Handler]:
        for beginning in self._open:
            if path.startswith(beginning) and path != beginning:
                return self._handlers[beginning]
        return {}
