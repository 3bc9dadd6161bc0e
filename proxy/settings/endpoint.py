"""How engines are written: a URL, or a name behind which there are some, with what nobody can ask them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

from proxy.dialects import DIALECTS
from proxy.planning.links import LABELS, labels

FINDERS: Mapping[str, str] = {
    "dns": "dns+http://name:port lists the addresses of a name",
    "srv": "srv+http://_service._tcp.name lists hosts and ports",
    "k8s": "k8s+http://NAMESPACE?selector=app=encoder&port=http lists the pods behind Services with these labels",
}
"""By the word before a URL: how several engines are written in one, see `proxy.discovery`."""

SECRET = r"^[!-~]+$"
"""What a bearer token can be: it stands in a line of a request's head."""

_NOTHING = frozenset({"", "disable", "none"})
_PORTS = ("bootstrap_port", "ec_port")  # facts that a URL may tell
_ASKED = {"k8s": ("selector", "port")}  # what a finder is told in a URL


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An engine's base URL, without a trailing slash, the dialect it is spoken to in, and facts that nobody can ask.

    With a `finder` it stands for all engines that are found there, each with the same facts.
    """

    url: str
    dialect: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    weight: float | None = None  # None: not told
    secret: str | None = field(default=None, repr=False)  # the bearer token that the engine asks for
    finder: str = ""
    asked: Mapping[str, str] = field(default_factory=dict)  # what the finder is told

    @classmethod
    def parse(cls, text: str, default: str) -> Endpoint:
        """From `http://host:port` or `dialect+http://host:port`, perhaps with `?weight=2&host=h1&rack=r1` and others;
        a finder stands before the dialect: `dns+vllm+http://name:port`.

        Raises ValueError saying what is wrong.
        """
        text = text.strip().rstrip("/")
        base, _, query = text.partition("?")
        base = base.rstrip("/")
        head, between, rest = base.partition("://")
        *words, scheme = head.split("+") if between else [base]
        finder = words.pop(0) if words and words[0] in FINDERS else ""
        dialect = words.pop(0) if words else default
        if words or (dialect != "auto" and dialect not in DIALECTS):
            raise ValueError(f"{base}: no dialect {'+'.join([dialect, *words])!r} (known: auto, {', '.join(DIALECTS)})")
        found = cls(f"{scheme}://{rest}" if between else base, dialect, finder=finder)
        found._check(base, "#" in text)
        return found._with(base, query)

    @property
    def name(self) -> str:
        """Of the finder and where it looks; of an engine, its URL."""
        asked = "&".join(f"{key}={value}" for key, value in self.asked.items())
        return f"{self.finder}+{self.url}{'?' if asked else ''}{asked}" if self.finder else self.url

    def at(self, netloc: str) -> Endpoint:
        """One of the engines behind it."""
        return replace(self, url=f"{urlsplit(self.url).scheme}://{netloc}", finder="", asked={})

    def _check(self, said: str, fragment: bool) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{said}: an engine's URL looks like http://host:port")
        if fragment or parts.path.strip("/") == "v1" or (self.finder and parts.path):
            raise ValueError(f"{said}: give the base URL only, like http://{parts.netloc}")
        try:
            port = parts.port
        except ValueError as error:
            raise ValueError(f"{said}: {error}") from None
        if self.finder and (port is not None) is not (self.finder == "dns"):
            raise ValueError(f"{said}: {FINDERS[self.finder]}")

    def _with(self, said: str, query: str) -> Endpoint:
        known = _ASKED.get(self.finder, ())
        try:
            given = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
            facts: dict[str, Any] = {name: int(given.pop(name)) for name in _PORTS if name in given}
            if any(not 0 < port < 1 << 16 for port in facts.values()):
                raise ValueError
            weight = weighed(given.pop("weight")) if "weight" in given else None
            secret = given.pop("key", None)
            if secret is not None and not re.fullmatch(SECRET, secret):
                raise ValueError
            asked = {name: given.pop(name) for name in known if name in given}
            if placed := labels(given):
                facts["labels"] = placed
        except ValueError:
            ways = [*(f"{name}=PORT" for name in _PORTS), *(f"{label}=NAME" for label in LABELS), "weight=2", "key="]
            may = ", ".join(f"?{way}" for way in [*ways, *(f"{name}=" for name in known)])
            raise ValueError(f"{said}: a URL may say {may} and nothing else") from None
        if self.finder == "k8s" and not asked.get("selector"):
            raise ValueError(f"{said}: {FINDERS['k8s']}")
        return replace(self, facts=facts, weight=weight, secret=secret, asked=asked)


def weighed(value: Any) -> float:
    """A weight that is one: more than 0, and finite. Raises ValueError."""
    weight = float(value)
    if not (weight > 0 and isfinite(weight)):
        raise ValueError(f"a weight is a number above 0, not {value}")
    return weight


def written(entry: Any) -> str:
    """One entry of a list in a YAML file as text: a URL, or a mapping of it and what it may say. Raises ValueError."""
    if not isinstance(entry, Mapping):
        return str(entry)
    said = {str(name): value for name, value in entry.items()}
    url, placed = said.pop("url", None), said.pop("labels", None) or {}
    if not isinstance(url, str) or not isinstance(placed, Mapping):
        raise ValueError("an engine is its URL, or a mapping with url, labels (a mapping), weight, key")
    query = "&".join(f"{quote(str(k), safe='')}={quote(str(v), safe='')}" for k, v in [*said.items(), *placed.items()])
    return f"{url}{'&' if '?' in url else '?'}{query}" if query else url


def nothing(text: str) -> bool:
    """Whether a list says that there is none."""
    return text.strip().lower() in _NOTHING


def urls(text: str) -> list[str]:
    """The entries of a list."""
    return [] if nothing(text) else [url for url in text.split(",") if url.strip()]
