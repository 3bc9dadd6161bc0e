"""What will not work between engines that are each well: models, transports, blocks of KV. Pure.

Our own engines tell what they transfer by; of others only role, family, version and model are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from proxy.core import BOTH, Instance, Role

_SHM = "shm"


@dataclass(frozen=True, slots=True)
class Engine:
    """An instance that is well, and what it says of itself: our engines' GET /info, else nothing."""

    instance: Instance
    info: Mapping[str, Any]

    @property
    def transfer(self) -> str:
        """The transport's name; empty where it is not told."""
        said = self.info.get("transfer")
        return str(said.get("name", "")) if isinstance(said, Mapping) else ""

    @property
    def host(self) -> str:
        return urlsplit(self.instance.url).hostname or ""


@dataclass(frozen=True, slots=True)
class Misfit:
    """`fails`: requests will; else it is only to be known. `advice`: what to do."""

    said: str
    advice: str
    fails: bool = True


def misfits(engines: Sequence[Engine]) -> Iterator[Misfit]:
    """What does not fit among engines that may work on one request."""
    named = [engine for engine in engines if engine.instance.model]
    if len({engine.instance.model for engine in named}) > 1:
        models = _by(named, lambda engine: engine.instance.model)
        yield Misfit(
            f"engines serve different models: {models}",
            "a request may reach any: serve one model, or run a proxy for each",
        )
    native = [engine for engine in engines if engine.instance.dialect == "native"]
    yield from _transports(native)
    yield from _blocks(native)
    for family in sorted({engine.instance.dialect for engine in engines}):
        same = [engine for engine in engines if engine.instance.dialect == family and _version(engine)]
        if len({_version(engine) for engine in same}) > 1:
            versions = _by(same, _version)
            yield Misfit(
                f"{family} engines of different versions: {versions}", "well while upgrading; not for long", fails=False
            )


def _transports(native: Sequence[Engine]) -> Iterator[Misfit]:
    telling = [engine for engine in native if engine.transfer]
    roles = {engine.instance.role for engine in telling}
    if roles <= {BOTH}:
        return  # nobody hands over anything
    if len({engine.transfer for engine in telling}) > 1:
        names = _by(telling, lambda engine: engine.transfer)
        yield Misfit(f"engines hand over by different transports: {names}", "start all with the same --transfer")
    shared = [engine for engine in telling if engine.transfer == _SHM]
    if len({engine.host for engine in shared}) > 1:
        hosts = _by(shared, lambda engine: engine.host)
        yield Misfit(
            f"shared memory reaches no other machine: {hosts}", "start all with --transfer mooncake, zmq or storage"
        )


def _blocks(native: Sequence[Engine]) -> Iterator[Misfit]:
    stages = (Role.PREFILL, Role.DECODE)
    handing = [engine for engine in native if engine.instance.role in stages and "block_size" in engine.info]
    if len({engine.info["block_size"] for engine in handing}) > 1:
        sizes = _by(handing, lambda engine: str(engine.info["block_size"]))
        yield Misfit(
            f"prefill and decode cut KV into blocks of different sizes: {sizes}", "start all with the same --block-size"
        )


def _version(engine: Engine) -> str:
    return str(engine.instance.facts.get("version") or "")


def _by(engines: Sequence[Engine], what: Callable[[Engine], str]) -> str:
    """Who says what, in words."""
    found: dict[str, list[str]] = {}
    for engine in engines:
        found.setdefault(what(engine), []).append(engine.instance.netloc)
    return "; ".join(f"{value} at {', '.join(who)}" for value, who in sorted(found.items()))
