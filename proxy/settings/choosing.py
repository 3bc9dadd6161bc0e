"""Flags about decisions."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, model_validator

from proxy.balancer import POLICIES
from proxy.core import ROLES, Role
from proxy.hedge import Hedge
from proxy.media.profiles import flagged
from proxy.planning.links import Links


class ChoosingSettings(BaseModel):
    """Choosing: who gets a leg, and what happens when it fails"""

    policy: str = Field(
        "",
        description=f"{', '.join(POLICIES)}: for all roles or as encode=affinity,decode=least_loaded; "
        "roles that are not named: affinity to encode, else least_loaded",
    )
    vision: str = Field(
        "",
        description="how images and videos become tokens: qwen2_vl, qwen2_5_vl, qwen3_vl, or a model's folder, for all "
        "models or as MODEL=…,MODEL=…; default: as encoders tell, else by the model's name",
    )
    link_rates: str = Field(
        "",
        description="bytes per second between engines that share a label (?host=…&rack=…&zone=… in their URLs), as "
        "host=40e9,rack=20e9,zone=10e9,other=2.5e9; these are the defaults",
    )
    inline_encoding: bool = Field(
        False,
        description="combined engines have an encoder of their own: give them media when encoders fail, or where that "
        "is foreseen to be sooner",
    )
    max_attempts: PositiveInt = Field(3, description="instances asked, at the most, for the same stage of a request")
    switch_roles: bool = Field(
        False,
        description="turn engines of our own from prefill to decode and back where GET /plan advises it, the fleet has "
        "little room and gains a fifth; never the last of a role",
    )
    switch_interval: PositiveFloat = Field(
        300.0, description="seconds between two such switches, at the least; an advice stands for a quarter of it first"
    )
    hedge_after: str = Field(
        "", description="try a second encoder after so many seconds, or a percentile of them like p95; empty: never"
    )
    resume: bool = Field(
        False, description="go on elsewhere with a stream whose engine died, where that is exact: greedy or seeded"
    )
    breaker_failures: PositiveInt = Field(5, description="failed legs in a row that keep an engine from new ones")
    breaker_delay: PositiveFloat = Field(5.0, description="seconds until such an engine is tried again")

    @model_validator(mode="after")
    def _readable_choices(self) -> Self:
        self.policies()
        flagged(self.vision)
        try:
            Links.parse(self.link_rates)
        except ValueError as error:
            raise ValueError(f"--link-rates: {error}") from None
        try:
            Hedge(self.hedge_after)
        except ValueError as error:
            raise ValueError(f"--hedge-after: {error}") from None
        return self

    def policies(self) -> dict[Role, str]:
        """The policy's name for each role. Raises ValueError."""
        chosen = {**dict.fromkeys(ROLES, "least_loaded"), Role.ENCODE: "affinity"}
        for entry in filter(None, (entry.strip() for entry in self.policy.split(","))):
            label, _, name = entry.rpartition("=")
            if name not in POLICIES:
                raise ValueError(f"--policy: no policy {name!r} (known: {', '.join(POLICIES)})")
            if label and label not in {role.label for role in ROLES}:
                raise ValueError(f"--policy: no role {label!r} (known: {', '.join(role.label for role in ROLES)})")
            chosen |= {role: name for role in ROLES if label in ("", role.label)}
        return chosen
