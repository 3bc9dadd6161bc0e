"""The fleet by HTTP: look, register, drain, remove. Instances live in memory; a restart begins with the flags again."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from proxy.balancer.balance import Balancer
from proxy.balancer.fleet import Event, Fleet
from proxy.core import Instance, Role, State
from proxy.errors import BadRequest, Conflict, NotFound, Unauthorized
from proxy.health import Health
from proxy.http.message import Response, json_response
from proxy.http.router import Audience, Route, delete, get, post
from proxy.http.server import Request
from proxy.links import labels
from proxy.settings import Endpoint

T = TypeVar("T", bound=BaseModel)


class Registration(BaseModel):
    """The body of POST /instances."""

    model_config = ConfigDict(extra="forbid")
    role: str
    url: str
    labels: dict[str, str] = {}  # beside those of the URL

    @field_validator("labels")
    @classmethod
    def _known(cls, given: dict[str, str]) -> dict[str, str]:
        return labels(given)


class Named(BaseModel):
    """The body of POST /instances/drain."""

    model_config = ConfigDict(extra="forbid")
    url: str


class Admin:
    def __init__(self, fleet: Fleet, balancer: Balancer, health: Health, key: str | None, dialect: str) -> None:
        self._fleet = fleet
        self._balancer = balancer
        self._health = health
        self._key = key
        self._dialect = dialect

    def routes(self) -> list[Route]:
        return [
            get("/instances", self.list, Audience.ADMINS),
            post("/instances", self.register, Audience.ADMINS),
            delete("/instances", self.remove, Audience.ADMINS),
            post("/instances/drain", self.drain, Audience.ADMINS),
        ]

    @property
    def locked(self) -> bool:
        """Whether changes need a key."""
        return self._key is not None

    async def list(self, request: Request) -> Response:
        return json_response({"instances": [self.shown(instance) for instance in self._fleet]})

    async def register(self, request: Request) -> Response:
        """Add an instance: it takes requests once a probe has found it healthy. Registering again ends a drain."""
        self._authorize(request)
        asked = await _body(request, Registration)
        try:
            role, endpoint = Role.named(asked.role), Endpoint.parse(asked.url, self._dialect)
            instance = self._fleet.join(endpoint.url, role, endpoint.dialect, _labelled(endpoint.facts, asked.labels))
        except KeyError:
            roles = "encode, prefill, decode, prefill_decode"
            raise BadRequest(f"no role {asked.role!r}: one of {roles}", param="role") from None
        except ValueError as error:
            raise (Conflict if "already" in str(error) else BadRequest)(str(error), param="url") from None
        self._health.wake()
        return json_response({"registered": True, "instance": self.shown(instance)})

    async def remove(self, request: Request) -> Response:
        """Forget an instance now. What runs on it goes on."""
        self._authorize(request)
        if not (url := request.query.get("url")):
            raise BadRequest("name the instance: DELETE /instances?url=http://host:port", param="url")
        instance = self._fleet.remove(url.rstrip("/"))
        if instance is not None:
            self._balancer.forget(instance)
        return json_response({"removed": instance is not None})

    async def drain(self, request: Request) -> Response:
        """Give an instance nothing new; it leaves the fleet when its last request has ended."""
        self._authorize(request)
        asked = await _body(request, Named)
        instance = self._fleet.get(asked.url.rstrip("/"))
        if instance is None:
            raise NotFound(f"no instance {asked.url}", param="url")
        self._fleet.apply(instance, Event.DRAIN, "drained by an admin")
        return json_response({"draining": instance.state is State.DRAINING, "instance": self.shown(instance)})

    def authorized(self, request: Request) -> dict[str, str]:
        """The headers that engines get of an admin's call: credentials, if they are not the admin key. Raises
        Unauthorized."""
        self._authorize(request)
        given = request.headers.get("authorization")
        ours = self._key is not None and "x-api-key" not in request.headers
        return {} if given is None or ours else {"authorization": given}

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
            "dialect": instance.dialect,
            "state": instance.state,
            "reason": instance.reason,
            "circuit": self._health.circuit(instance),
            "model": instance.model,
            "facts": instance.facts,
            "leases": ledger.leases(url=instance.url),
            "load": load,
            **shown,
        }

    def _authorize(self, request: Request) -> None:
        if self._key is None:
            return
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        given = request.headers.get("x-api-key", bearer)
        if not hmac.compare_digest(given.encode(), self._key.encode()):
            raise Unauthorized("this needs the admin key, in X-API-Key or as a bearer token")


def _labelled(facts: Mapping[str, Any], given: Mapping[str, str]) -> Mapping[str, Any]:
    return {**facts, "labels": {**facts.get("labels", {}), **given}} if given else facts


async def _body(request: Request, model: type[T]) -> T:
    try:
        return model.model_validate_json(await request.read())
    except ValidationError as error:
        first = error.errors()[0]
        raise BadRequest(first["msg"], param=".".join(map(str, first["loc"])) or None) from None
