"""The routes and the words of a language engine that has an encoder of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry

from engines.encoder.app import EncoderApp
from engines.language.app import LanguageApp


def over(*parts: CollectorRegistry) -> CollectorRegistry:
    """What all of them tell, and what is added to this one alone."""
    registry = CollectorRegistry()
    for part in parts:
        registry.register(part)
    return registry


class ColocatedApp:
    """An `engines.http.Engine`: a language engine to whoever calls it. Only /info, /metrics and /audit tell more.

    encoder_url: where the encoder is served by itself, if it is.
    """

    encoder_url: str | None = None

    def __init__(self, language: LanguageApp, encoder: EncoderApp) -> None:
        self.registry = over(language.registry, encoder.registry)
        self._language = language
        self._encoder = encoder

    @property
    def stage(self) -> str:
        return self._language.stage

    @property
    def role(self) -> str:
        return self._language.role

    def routes(self) -> Iterable[web.RouteDef]:
        return self._language.routes()

    def info(self) -> Mapping[str, Any]:
        """What the proxy knows encoders by stands beside what it knows language engines by."""
        encoder = self._encoder.info()
        here = {"encodes": True, "vision": encoder["vision"], "encoder": {**encoder, "url": self.encoder_url}}
        return {**self._language.info(), **here}

    async def check(self) -> None:
        await self._language.check()
        await self._encoder.check()

    async def drain(self) -> None:
        await self._language.drain()
