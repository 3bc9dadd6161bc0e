"""The page at /ui: its files, and what it shows. It changes nothing: its buttons call the routes of `admin`.

    GET /ui               the page
    GET /ui/{file}        what it is made of
    GET /ui/state         see `snapshot`; ?since=N for who has the curves' points up to N
    GET /ui/key           204 if the call has the admin key, else 401

Nothing is loaded from elsewhere, and the browser is told to allow nothing else.
"""

from __future__ import annotations

from functools import partial
from importlib.resources import files

from blake3 import blake3

from proxy.admin import Admin
from proxy.errors import BadRequest
from proxy.http.message import JSON, Response
from proxy.http.router import Audience, Handler, Route, get
from proxy.http.server import Request
from proxy.telemetry.snapshot import Snapshots

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_ALWAYS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Page:
    def __init__(self, snapshots: Snapshots, admin: Admin) -> None:
        self._snapshots = snapshots
        self._admin = admin
        self._files = {file.name: file.read_bytes() for file in files("proxy").joinpath("ui").iterdir()}

    def routes(self) -> list[Route]:
        routes: dict[str, Handler] = {f"/ui/{name}": partial(self.file, name) for name in self._files}
        routes |= {"/ui": partial(self.file, "index.html"), "/ui/state": self.state, "/ui/key": self.key}
        return [get(path, handler, Audience.ADMINS) for path, handler in routes.items()]

    async def file(self, name: str, request: Request) -> Response:
        """304 for who has it already."""
        data = self._files[name]
        tag = f'"{blake3(data).hexdigest(16)}"'
        headers = {**_ALWAYS, "etag": tag, "content-type": _TYPES[name.rpartition(".")[2]]}
        known = request.headers.get("if-none-match") == tag
        return Response(304, b"", headers) if known else Response(200, data, headers)

    async def state(self, request: Request) -> Response:
        """The snapshot."""
        since = request.query.get("since")
        if since is not None and not (since.isascii() and since.isdecimal() and len(since) < 16):
            raise BadRequest(f"since must be a number, got {since!r}", param="since")
        told = await self._snapshots.get(None if since is None else int(since))
        return Response(200, told, {**_ALWAYS, "cache-control": "no-store", "content-type": JSON})

    async def key(self, request: Request) -> Response:
        """Whether the caller may drain."""
        self._admin.authorized(request)
        return Response(204, b"", {"cache-control": "no-store"})
