"""How an engine is written: its URL, with what nobody can ask it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from proxy.dialects import DIALECTS
from proxy.links import LABELS, labels

_NOTHING = frozenset({"", "disable", "none"})
_PORTS = ("bootstrap_port", "ec_port")  # facts that a URL may tell


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An engine's base URL, without a trailing slash, the dialect it is spoken to in, and facts that nobody can ask."""

    url: str
    dialect: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, default: str) -> Endpoint:
        """From `http://host:port` or `dialect+http://host:port`, perhaps with `?bootstrap_port=8998&host=h1&rack=r1`.

        Raises ValueError saying what is wrong.
        """
        text = text.strip().rstrip("/")
        named, plus, rest = text.partition("+")
        dialect, url = (named, rest) if plus and "://" not in named else (default, text)
        if dialect != "auto" and dialect not in DIALECTS:
            raise ValueError(f"{text}: no dialect {dialect!r} (known: auto, {', '.join(DIALECTS)})")
        parts = urlsplit(url)
        facts = _facts(text, parts.query)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{text}: an engine's URL looks like http://host:port")
        if parts.fragment or parts.path.strip("/") == "v1":
            raise ValueError(f"{text}: give the base URL only, like http://{parts.netloc}")
        try:
            parts.port  # noqa: B018 - reading it checks the range
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from None
        return cls(url.partition("?")[0].rstrip("/"), dialect, facts)


def _facts(text: str, query: str) -> dict[str, Any]:
    try:
        given = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
        facts: dict[str, Any] = {name: int(given.pop(name)) for name in _PORTS if name in given}
        if any(not 0 < port < 1 << 16 for port in facts.values()):
            raise ValueError
        if placed := labels(given):
            facts["labels"] = placed
    except ValueError:
        said = ", ".join([*(f"?{name}=PORT" for name in _PORTS), *(f"?{label}=NAME" for label in LABELS)])
        raise ValueError(f"{text}: a URL may say {said} and nothing else") from None
    return facts


def nothing(text: str) -> bool:
    """Whether a list says that there is none."""
    return text.strip().lower() in _NOTHING


def urls(text: str) -> list[str]:
    """The entries of a list."""
    return [] if nothing(text) else [url for url in text.split(",") if url.strip()]
