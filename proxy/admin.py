"""The fleet by HTTP: look, register, drain, remove. Instances live in memory; a restart begins with the lists again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator

from proxy.auth.guard import Guard
from proxy.balancer.balance import Balancer
from proxy.balancer.fleet import Fleet
from proxy.core import Instance, Role, State
from proxy.errors import BadRequest, Conflict, NotFound
from proxy.health import Health
from proxy.http.message import Response, json_response
from proxy.http.router import Audience, Route, delete, get, post
from proxy.http.server import Request
from proxy.joining.membership import REGISTERED, Membership
from proxy.planning.links import labels
from proxy.settings import Endpoint
from proxy.settings.endpoint import SECRET
from proxy.switching import Switching

T = TypeVar("T", bound=BaseModel)


class Registration(BaseModel):
    """The body of POST /instances."""

    model_config = ConfigDict(extra="forbid")
    role: str
    url: str
    labels: dict[str, str] = {}  # beside those of the URL
    weight: FiniteFloat | None = Field(None, gt=0)
    key: str | None = Field(None, pattern=SECRET)  # that the engine asks for
    ttl: FiniteFloat | None = Field(None, gt=0, le=3600)  # seconds until the next heartbeat; None: for ever
    life: str = ""  # another one for each process: what tells an engine that was started again from a heartbeat

    @field_validator("labels")
    @classmethod
    def _known(cls, given: dict[str, str]) -> dict[str, str]:
        return labels(given)


class Named(BaseModel):
    """The body of POST /instances/drain."""

    model_config = ConfigDict(extra="forbid")
    url: str


class Switched(BaseModel):
    """The body of POST /instances/role."""

    model_config = ConfigDict(extra="forbid")
    url: str
    role: str
    timeout: FiniteFloat | None = Field(None, gt=0)  # seconds; None: --switch-timeout
    force: bool = False  # even if the fleet serves nobody meanwhile


class Admin:
    def __init__(
        self,
        fleet: Fleet,
        membership: Membership,
        balancer: Balancer,
        health: Health,
        switching: Switching,
        guard: Guard,
        dialect: str,
    ) -> None:
        self._fleet = fleet
        self._membership = membership
        self._balancer = balancer
        self._health = health
        self._switching = switching
        self._guard = guard
        self._dialect = dialect

    def routes(self) -> list[Route]:
        return [
            get("/instances", self.list, Audience.ADMINS),
            post("/instances", self.register, Audience.ADMINS),
            delete("/instances", self.remove, Audience.ADMINS),
            post("/instances/drain", self.drain, Audience.ADMINS),
            post("/instances/role", self.switch, Audience.ADMINS),
        ]

    @property
    def locked(self) -> bool:
        """Whether changes need a key."""
        return self._guard.locked

    async def list(self, request: Request) -> Response:
        held = {url: sorted(sources) for url, sources in self._fleet.held.items()}
        return json_response({"instances": [self.shown(instance) for instance in self._fleet], "held": held})

    async def register(self, request: Request) -> Response:
        """Add an instance: it takes requests once a probe has found it healthy. Registering again ends a drain, and is
        a heartbeat where there is a `ttl`."""
        self._guard.admin(request, engines=True)
        asked = await _body(request, Registration)
        if asked.ttl is None:
            self._guard.admin(request)
        try:
            role, endpoint = _role(asked.role), self._endpoint(asked)
            until = None if asked.ttl is None else time.monotonic() + asked.ttl
            instance = self._membership.register(role, endpoint, asked.life, until)
        except (ValueError, LookupError) as error:
            raise (Conflict if "already" in str(error) else BadRequest)(str(error), param="url") from None
        if instance is not None and instance.state in (State.JOINING, State.DOWN):
            self._health.wake()
        shown = None if instance is None else self.shown(instance)
        return json_response({"registered": instance is not None, "instance": shown})

    async def remove(self, request: Request) -> Response:
        """Forget an instance now. What runs on it goes on."""
        self._guard.admin(request)
        if not (url := request.query.get("url")):
            raise BadRequest("name the instance: DELETE /instances?url=http://host:port", param="url")
        return json_response({"removed": self._membership.remove(url.rstrip("/")) is not None})

    async def drain(self, request: Request) -> Response:
        """Give an instance nothing new; it leaves the fleet when its last request has ended."""
        self._guard.admin(request, engines=True)
        asked = await _body(request, Named)
        instance = self._named(asked.url)
        if REGISTERED not in instance.sources:
            self._guard.admin(request)
        self._membership.drain(instance, "drained by an admin")
        self._health.wake()
        return json_response({"draining": instance.state is State.DRAINING, "instance": self.shown(instance)})

    async def switch(self, request: Request) -> Response:
        """Have an instance turn to another role once it is idle, which takes as long as its last request. It is as it
        was if that fails, or if the caller hangs up."""
        self._guard.admin(request)
        asked = await _body(request, Switched)
        instance, role = self._named(asked.url), _role(asked.role)
        was = instance.role
        await self._switching.switch(instance, role, asked.timeout, asked.force)
        return json_response({"role": role.label, "was": was.label, "instance": self.shown(instance)})

    def _named(self, url: str) -> Instance:
        """Raises BadRequest, NotFound."""
        try:
            instance = self._fleet.get(Endpoint.parse(url, self._dialect).url)
        except ValueError as error:
            raise BadRequest(str(error), param="url") from None
        if instance is None:
            raise NotFound(f"no instance {url}", param="url")
        return instance

    def _endpoint(self, asked: Registration) -> Endpoint:
        endpoint = Endpoint.parse(asked.url, self._dialect)
        if endpoint.finder:
            raise ValueError(f"{endpoint.name}: names are listed by flags and the file")
        weight, secret = asked.weight or endpoint.weight, asked.key or endpoint.secret
        return replace(endpoint, facts=_labelled(endpoint.facts, asked.labels), weight=weight, secret=secret)

    def authorized(self, request: Request) -> dict[str, str]:
        """The headers that engines get of an admin's call: credentials, if they are for them. Raises Unauthorized,
        TriedTooOften."""
        self._guard.admin(request)
        given = request.headers.get("authorization")
        forwarded = self._guard.forwarded(request.headers, self._guard.locked)
        return {} if given is None or not forwarded else {"authorization": given}

    def shown(self, instance: Instance) -> dict[str, Any]:
        """What is so of it by all workers; rates and items, by this one: each learns from its own requests."""
        ledger, rates = self._balancer.ledger, self._balancer.rates[instance.role]
        load = ledger.load(instance.url)
        shown: dict[str, Any] = {"rate": rates.shown(instance.url)}
        if instance.role is not Role.DECODE:  # whose legs run beside each other, not one after the other
            shown["pending_seconds"] = load * rates.seconds(instance.url)
        if instance.role is Role.ENCODE:
            shown["items"] = self._balancer.holders.count(instance.url)
        return {
            "url": instance.url,
            "role": instance.role.label,
            "listed_as": instance.listed.label,
            "turning_to": None if instance.switch is None else instance.switch.role.label,
            "dialect": instance.dialect,
            "state": instance.state,
            "reason": instance.reason,
            "circuit": self._health.circuit(instance),
            "sources": sorted(instance.sources),
            "weight": instance.weight,
            "model": instance.model,
            "facts": instance.facts,
            "leases": ledger.leases(url=instance.url),
            "load": load,
            **shown,
        }


def _role(label: str) -> Role:
    """Raises BadRequest."""
    try:
        return Role.named(label)
    except KeyError:
        roles = "encode, prefill, decode, prefill_decode"
        raise BadRequest(f"no role {label!r}: one of {roles}", param="role") from None


def _labelled(facts: Mapping[str, Any], given: Mapping[str, str]) -> Mapping[str, Any]:
    return {**facts, "labels": {**facts.get("labels", {}), **given}} if given else facts


async def _body(request: Request, model: type[T]) -> T:
    try:
        return model.model_validate_json(await request.read())
    except ValidationError as error:
        first = error.errors()[0]
        raise BadRequest(first["msg"], param=".".join(map(str, first["loc"])) or None) from None
