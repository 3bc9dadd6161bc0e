"""The path of one request, with the reason in words. Sees roles and counts, never an instance or a load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxy.core import BOTH, ROLES, Path, Role, Stage, State
from proxy.errors import BadRequest, NoInstance
from proxy.routing import paths

Census = Mapping[Role, Mapping[Any, int]]
"""How many instances of each role are in each state: a State, or a word for why a READY one cannot be used."""

_WORDS = {BOTH: "combined"}
_STAGES = {Role.ENCODE: Stage.ENCODE, Role.PREFILL: Stage.PREFILL}


@dataclass(frozen=True, slots=True)
class Route:
    path: Path
    reason: str
    others: tuple[Path, ...] = ()  # that could serve as well, the more wanted first
    lacks: str = ""  # see Plan


def route(items: int, census: Census, param: str | None = None, inline: tuple[Path, ...] = ()) -> Route:
    """The best path that the READY instances can serve for a request with `items` media items, `inline` where they may.

    Raises BadRequest if this deployment can never encode (naming `param`), NoInstance if it cannot serve now.
    """
    options = paths.candidates(items > 0, inline)
    if items and not census.get(Role.ENCODE) and not any(_possible(path, census) for path in inline):
        raise BadRequest(
            "this deployment has no encoder: send text only, or start the proxy with --encode-servers-urls",
            param=param,
            code="media_unsupported",
        )
    served = [path for path in options if all(census.get(role, {}).get(State.READY) for role in path.roles)]
    if not served:
        raise _unavailable(options, census)
    return Route(served[0], _reason(served[0], items, census), tuple(served[1:]), _lacks(served[0], census))


def what(items: int) -> str:
    """A request in words, as every reason begins."""
    return "text only" if not items else f"{items} item" + "s" * (items > 1)


def _reason(path: Path, items: int, census: Census) -> str:
    asked = what(items)
    if path in paths.INLINE:
        return f"{asked}, encoded inline because no encoder is {'ready' if census.get(Role.ENCODE) else 'listed'}"
    if Role.PREFILL in path.roles:
        return f"{asked}, prefill and decode apart"
    if census.get(Role.PREFILL):
        return f"{asked}, combined because no prefill and decode pair is ready"
    return f"{asked}, combined engines only"


def _lacks(path: Path, census: Census) -> str:
    if path in paths.INLINE:
        return "encoder" if census.get(Role.ENCODE) else ""
    return "pair" if path.combined and census.get(Role.PREFILL) else ""


def _possible(path: Path, census: Census) -> bool:
    return all(census.get(role) for role in path.roles)


def _unavailable(options: tuple[Path, ...], census: Census) -> NoInstance:
    """Names the first role that keeps the most wanted possible path from being served, and its states."""
    possible = [path for path in options if _possible(path, census)]
    wanted = possible[0] if possible else options[0]
    missing = next(role for role in wanted.roles if not census.get(role, {}).get(State.READY))
    states = ", ".join(f"{count} {state}" for state, count in census.get(missing, {}).items() if count)
    return NoInstance(
        f"no {_WORDS.get(missing, missing.label)} engine is ready ({states or 'none known'})",
        stage=_STAGES.get(missing, Stage.DECODE),
    )


def servable(census: Census) -> bool:
    """Whether every kind of request that this fleet is made for can be served now."""
    ready = {role for role in ROLES if census.get(role, {}).get(State.READY)}
    media = bool(census.get(Role.ENCODE))
    return any(ready.issuperset(path.roles) for path in paths.candidates(media))
