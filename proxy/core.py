"""The proxy's nouns, once. This module imports nobody but `record`, awaits nothing and knows no engine family's wire
format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, Flag, StrEnum, auto
from typing import Any, NamedTuple, Protocol

from proxy.record import Choice, Record

Body = Mapping[str, Any]
"""A parsed OpenAI request or answer: derived from, never mutated."""


class Role(Flag):
    """What an instance does; a combined engine is `PREFILL | DECODE`."""

    ENCODE = auto()
    PREFILL = auto()
    DECODE = auto()

    __hash__ = object.__hash__  # each is one object; enum's own is a call into Python at every look into a dict

    @property
    def label(self) -> str:
        """The word of flags, headers, metrics and `/info`; the combined role is `both` there."""
        return _LABELS[self]

    @classmethod
    def named(cls, label: str) -> Role:
        """The role behind a label or one of its synonyms. Raises KeyError."""
        return _SYNONYMS[label]


BOTH = Role.PREFILL | Role.DECODE
_LABELS = {Role.ENCODE: "encode", Role.PREFILL: "prefill", Role.DECODE: "decode", BOTH: "both"}
_SYNONYMS = {label: role for role, label in _LABELS.items()} | {"prefill_decode": BOTH}
ROLES: tuple[Role, ...] = tuple(_LABELS)
"""Every role an instance can have here, in the order of the stages."""


class Stage(StrEnum):
    """Where an error arose."""

    PROXY = "proxy"
    ENCODE = "encode"
    PREFILL = "prefill"
    DECODE = "decode"


class State(StrEnum):
    """An instance's life; `balancer.fleet.TRANSITIONS` says how it moves."""

    JOINING = "JOINING"
    READY = "READY"
    DOWN = "DOWN"
    DRAINING = "DRAINING"
    GONE = "GONE"


class Order(Enum):
    """How a dialect's prefill and decode are sent."""

    SEQUENTIAL = auto()  # P answers with the handoff, then D is called with it (pull)
    TOGETHER = auto()  # both are called at once with a rendezvous of ours; the failure of either ends the other
    DECODE_FIRST = auto()  # D is called, calls the metaserver with its descriptor, then P is called with that (push)


class Api(StrEnum):
    """A generation route: the value is its path, the same on the proxy and on every engine."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


class Path(Enum):
    """Which stages a request takes apart, as the roles of its legs in order."""

    E_P_D = ("E-P-D", (Role.ENCODE, Role.PREFILL, Role.DECODE))
    E_PD = ("E-PD", (Role.ENCODE, BOTH))
    P_D = ("P-D", (Role.PREFILL, Role.DECODE))
    PD = ("PD", (BOTH,))
    EP_D = ("EP-D", (Role.PREFILL, Role.DECODE))  # media encoded inline, by an engine that has an encoder of its own
    EPD = ("EPD", (BOTH,))  # the same

    def __init__(self, label: str, roles: tuple[Role, ...]) -> None:
        self.label = label
        self.roles = roles
        self.encodes = Role.ENCODE in roles
        self.generation = tuple(role for role in roles if role is not Role.ENCODE)
        self.combined = BOTH in roles


@dataclass(frozen=True, slots=True)
class Item:
    """One multimodal part of a request, at `messages[message].content[part]`."""

    index: int  # among the request's items, in reading order
    message: int
    part: int
    modality: str  # image | video | audio
    content: Mapping[str, Any]  # the part as an encoder gets it: the client's, with our uuid or none
    mm_hash: str | None  # None: the media is a URL whose bytes the encoder fetches and hashes
    identity: str  # equal for two items only if they are the same media: mm_hash, else the URL
    tokens: int  # predicted vision (or audio) tokens
    work: int = 1  # predicted, of encoding it: in tokens of a small image
    nbytes: int = 0  # predicted, of its embedding

    @property
    def param(self) -> str:
        """The client's own name for this part, for `error.param`."""
        return f"messages[{self.message}].content[{self.part}]"


def model_of(body: Body) -> str:
    """The model that a request names; empty if it does not."""
    named = body.get("model")
    return named if isinstance(named, str) else ""


def field_lines(headers: Mapping[str, str]) -> str:
    """Headers as lines of a head."""
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()])


@dataclass(frozen=True, slots=True)
class Job:
    """One parsed request. `body` is as the client sent it, except for what `openai.parse` refuses or replaces."""

    id: str
    api: Api
    body: Body
    items: tuple[Item, ...]
    text_tokens: int  # predicted: of text and tools; told: of token ids
    output_tokens: int  # predicted, of all choices together
    stream: bool
    headers: Mapping[str, str] = field(default_factory=dict)  # end-to-end headers that every engine gets
    fields: str = ""  # the same as lines of a head
    nbytes: int = 0  # of the request's body
    raw: bytes | bytearray = field(default=b"", repr=False)  # as it came, unpacked
    text_bytes: int = 0  # of the text behind `text_tokens`, in UTF-8; 0 where there are token ids: nothing to correct
    record: Record = field(default_factory=Record, compare=False, repr=False)  # of the request, in all its attempts

    def with_headers(self, headers: Mapping[str, str]) -> Job:
        """The same job, sent with more headers."""
        merged = {**self.headers, **headers}
        return replace(self, headers=merged, fields=field_lines(merged))

    @property
    def model(self) -> str:
        return model_of(self.body)

    @property
    def prompt_tokens(self) -> int:
        """Predicted prompt length in tokens, media included."""
        return self.text_tokens + sum([item.tokens for item in self.items]) if self.items else self.text_tokens


UNASKED = "not probed yet"
"""Why an instance is JOINING of which nothing is known."""


class Switch(NamedTuple):
    """A change of an instance's role that is under way."""

    role: Role  # to be
    until: float  # on the monotonic clock: whoever saw to it is dead if it is not over soon after


@dataclass(slots=True)
class Instance:
    """One engine process behind a URL. Only `balancer.fleet` changes `state`; the probe fills in what `/info` says."""

    url: str
    role: Role
    dialect: str  # a name of proxy.dialects, or "auto" until the probe has found it
    state: State = State.JOINING
    reason: str = UNASKED  # why it is in this state, for people
    model: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)  # JSON; what its URL or the probe says beside: see `Dialect`
    failures: int = 0  # probes failed in a row
    secret: str | None = field(default=None, repr=False)  # the credential it asks for; never shown
    weight: float = 1.0  # capacity, relative to that of the others with its role
    sources: frozenset[str] = frozenset()  # who lists it: see `proxy.joining.membership`
    listed_as: Role | None = None  # the role that they list it with, where the engine has turned to another since
    switch: Switch | None = None

    @property
    def listed(self) -> Role:
        """The role that its sources list it with."""
        return self.listed_as or self.role

    def turn(self, role: Role) -> None:
        """The engine has this role now, whatever the lists say."""
        listed = self.listed
        self.role, self.listed_as = role, None if role == listed else listed

    @property
    def netloc(self) -> str:
        return self.url.partition("://")[2]


@dataclass(frozen=True, slots=True)
class Handle:
    """Where one item's embedding is, as its encoder reported it; `entry` is opaque and goes to prefill verbatim."""

    mm_hash: str
    modality: str
    metadata: Mapping[str, Any]  # the grids
    entry: Mapping[str, Any]


class Hold(Protocol):
    """What a leg keeps from others while it lasts: load in the ledger, a circuit's trial. Closed once or more often."""

    def succeeded(self) -> None:
        """The engine did its part."""

    def failed(self, error: Exception, now: float) -> bool:
        """The leg failed; whose fault it was is judged here. True: nobody should be sent there for a time."""

    def prefilled(self) -> None:
        """The prompt is in KV: what was charged for that alone is given back."""

    def close(self) -> None:
        """The leg is over, whatever happened."""


@dataclass(frozen=True, slots=True)
class Leg:
    """One stage of one request on one instance; an encode leg carries the items sent there."""

    role: Role
    instance: Instance
    items: tuple[Item, ...] = ()
    hold: Hold | None = field(default=None, compare=False, repr=False)
    choices: tuple[Choice, ...] = field(default=(), compare=False, repr=False)  # that were made for it


@dataclass(frozen=True, slots=True)
class Plan:
    """The path and all its legs, chosen before the first byte is sent."""

    path: Path
    reason: str
    legs: tuple[Leg, ...]
    foreseen: float = 0.0  # predicted seconds to the first token, from when it was drawn; 0: nobody needed to know
    lacks: str = ""  # what is listed and not ready, that a better path would need: encoder, pair

    def leg(self, role: Role) -> Leg:
        """The one leg with this role. Raises LookupError if the path has none."""
        for leg in self.legs:
            if leg.role == role:
                return leg
        raise LookupError(f"path {self.path.label} has no {role.label} leg")

    @property
    def encodes(self) -> Sequence[Leg]:
        return [leg for leg in self.legs if leg.role == Role.ENCODE]

    def __str__(self) -> str:
        """The route receipt of `x-triptych-route`."""
        parts = [self.path.label]
        for role in self.path.roles:
            where = ",".join(leg.instance.netloc for leg in self.legs if leg.role == role)
            parts.append(f"{role.label}={where}")
        if self.foreseen:
            parts.append(f"foreseen={self.foreseen * 1000:.0f}ms")
        return "; ".join([*parts, f"reason={self.reason}"])
