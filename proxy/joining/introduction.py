"""What an engine has to show before it may serve: who it is, that it fits into the fleet, and one real request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import orjson

from proxy.core import Instance, Order, Role, Stage
from proxy.dialects.base import Dialect
from proxy.errors import EngineFailed
from proxy.joining import detect
from proxy.joining.detect import Found
from proxy.joining.membership import REGISTERED
from proxy.planning.families import UNKNOWN, Families
from proxy.upstream import Upstream

log = logging.getLogger(__name__)

_VLLM_BOOTSTRAP_PORT = 8998
_KEYED = (401, 403)


class Unfit(Exception):
    """The engine answers but cannot be used in its list."""


class Keyed(Unfit):
    """It asks for a key that it was not shown."""

    def __init__(self) -> None:
        super().__init__(
            "it asks for a key: give it one with its URL, all of them one with --engine-key, or have clients "
            "bring it (--forward-authorization)"
        )


@dataclass(frozen=True, slots=True)
class Patience:
    """In seconds."""

    question: float
    warm_up: float


class Introduction:
    def __init__(
        self,
        upstream: Upstream,
        dialects: Callable[[Instance], Dialect],
        families: Families,
        patience: Patience,
        forward: bool = False,
    ) -> None:
        """`forward`: clients bring the keys of engines that ask for one which is not known here."""
        self._upstream = upstream
        self._dialects = dialects
        self._families = families
        self.patience = patience
        self.forward = forward

    async def __call__(self, instance: Instance, listed: Iterable[Instance]) -> None:
        """Fill in what `instance` says of itself, and try it, among the `listed`. Raises Unfit, EngineFailed."""
        found = await self._found(instance)
        if found is not None:
            self._role(instance, found)
            instance.model = found.model or instance.model
            instance.facts = _updated(instance.facts, found)
        if reason := self.stray(instance, listed):
            raise Unfit(reason)
        await self._bootstrap(instance)
        await self._warm_up(instance)

    def _role(self, instance: Instance, found: Found) -> None:
        """An engine that was started as it is listed may have turned to another role since. Raises Unfit."""
        if found.role is None:
            return
        if found.role == instance.role:
            if found.started_as is not None and instance.sources == {REGISTERED}:  # it registers as what it is now
                instance.listed_as = None if found.started_as == instance.role else found.started_as
            return
        if instance.listed not in (found.role, found.started_as):
            first = (found.started_as or found.role).label
            raise Unfit(f"it is started with the role {first!r}, but listed as {instance.listed.label!r}")
        log.info("%s is %s now, and was %s here", instance.netloc, found.role.label, instance.role.label)
        instance.turn(found.role)

    def stray(self, instance: Instance, listed: Iterable[Instance]) -> str | None:
        """Why `instance` can never serve in this fleet; None if it can, or that is not known yet."""
        return None if instance.dialect == UNKNOWN else self._families.stray(instance, listed)

    async def _found(self, instance: Instance) -> Found | None:
        ask = detect.asking(self._upstream, instance, self.patience.question)
        if instance.dialect != UNKNOWN:
            found = await detect.detect(ask, instance.dialect)
            if found is None:
                await self._ask_for_key(instance)
            return found
        found = await detect.detect(ask)
        if found is None:
            await self._ask_for_key(instance)
            known = ", ".join(detect.FAMILIES)
            raise Unfit(
                f"it is of no family that is known here ({known}), as far as it says: give its dialect in the URL"
            )
        if detect.plugged(found):
            raise Unfit(
                f"it is vLLM built for other hardware ({found.how}): if that is Ascend, write ascend+{instance.url}, "
                f"else vllm+{instance.url}; a prefill engine of vLLM-Ascend ends with what vLLM's is asked for"
            )
        instance.dialect = found.family
        log.info("%s %s speaks %s: %s", instance.role.label, instance.netloc, found.family, found.how)
        return found

    async def _ask_for_key(self, instance: Instance) -> None:
        """Raises Keyed if `instance` tells nobody who it is without one."""
        status, _ = await self._upstream.get(instance, "/info", self.patience.question)
        if status in _KEYED and not self.forward:
            raise Keyed

    async def _bootstrap(self, instance: Instance) -> None:
        """Where prefill and decode of vLLM are called together, decode must be told the prefill engine's own id."""
        if instance.dialect != "vllm" or instance.role is not Role.PREFILL:
            return
        if self._dialects(instance).order is not Order.TOGETHER:
            return
        url = detect.bootstrap_url(instance, _VLLM_BOOTSTRAP_PORT)
        ids = await detect.engine_ids(detect.asking(self._upstream, replace(instance, url=url), self.patience.question))
        if not ids:
            raise Unfit(f"its bootstrap server {url} does not tell its engine id")
        instance.facts = {**instance.facts, "bootstrap": url, "engine_ids": ids}

    async def _warm_up(self, instance: Instance) -> None:
        call = self._dialects(instance).warm_up(instance.role, instance.model)
        if call is None:
            return
        path, body = call
        data, seconds = orjson.dumps(body), self.patience.warm_up
        post = self._upstream.post(instance, Stage.PROXY, path, data, "x-request-id: warm-up\r\n", seconds)
        try:
            async with post as answer:
                await answer.read()
        except EngineFailed as error:
            if error.status in _KEYED and self.forward:
                log.info("%s asks for a key, and serves without a warm-up request", instance.netloc)
                return
            if error.status in _KEYED:
                raise Keyed from None
            raise Unfit(f"its warm-up request failed: {error}") from None


def _updated(facts: Mapping[str, Any], found: Found) -> dict[str, Any]:
    """What the engine says now in place of what it said before; a port that its URL tells stays."""
    said = {name: value for name, value in found.facts.items() if value is not None}
    port = {"bootstrap_port": facts["bootstrap_port"]} if "bootstrap_port" in facts else {}
    return {**facts, **said, **port, "known_by": found.how}
