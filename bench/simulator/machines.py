"""Who is there: engines by URL, as the proxy's fleet knows them and as they are simulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from bench.simulator.clock import Clock
from bench.simulator.encoders import Encoder, SimulatedEncoder
from bench.simulator.engines import Engine, SimulatedEngine
from proxy.core import Role

Spec: TypeAlias = Encoder | Engine


@dataclass(frozen=True, slots=True)
class Machine:
    """`facts` are what the proxy is told of it beside its room for KV, as from `/info` or POST /instances."""

    url: str
    role: Role
    spec: Spec
    facts: Mapping[str, Any] = field(default_factory=dict)
    slowness: float = 1.0  # times its model's seconds

    @property
    def told(self) -> Mapping[str, Any]:
        """All that the proxy is told."""
        if isinstance(self.spec, Encoder):
            return self.facts
        return {"kv_tokens": self.spec.kv_tokens, **self.facts}


class Park:
    """The simulated engines."""

    def __init__(self, clock: Clock, machines: tuple[Machine, ...]) -> None:
        self.machines = {machine.url: machine for machine in machines}
        self.encoders: dict[str, SimulatedEncoder] = {}
        self.engines: dict[str, SimulatedEngine] = {}
        for machine in machines:
            if isinstance(machine.spec, Encoder):
                self.encoders[machine.url] = SimulatedEncoder(clock, machine.spec)
            else:
                self.engines[machine.url] = SimulatedEngine(clock, machine.spec, Role.DECODE in machine.role)
            self.at(machine.url).slowness = machine.slowness

    def at(self, url: str) -> SimulatedEncoder | SimulatedEngine:
        """Raises KeyError."""
        return self.encoders.get(url) or self.engines[url]
