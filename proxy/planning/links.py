"""Where instances stand, by their labels, and how fast bytes go from one to another. Pure; nothing is measured here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from proxy.core import Instance


class Place(NamedTuple):
    """An instance's labels, from wide to near; empty where nobody has told."""

    zone: str = ""
    rack: str = ""
    host: str = ""

    @classmethod
    def of(cls, instance: Instance) -> Place:
        return cls(**instance.facts.get("labels", {}))


LABELS: tuple[str, ...] = Place._fields

HOP = 2e-3
"""Seconds that a stage of its own costs before any byte: a call, and a transfer that begins (1 ms by RDMA)."""


@dataclass(frozen=True, slots=True)
class Links:
    """Bytes per second between two instances, by the nearest label that they share.

    The defaults are RDMA's 20 to 40 GB/s by what is published of Mooncake, and 20 Gbit/s of plain TCP beyond a zone.
    """

    host: float = 40e9
    rack: float = 20e9
    zone: float = 10e9
    other: float = 2.5e9

    @classmethod
    def parse(cls, text: str) -> Links:
        """From `host=40e9,rack=20e9,zone=10e9,other=2.5e9`, or some of these. Raises ValueError."""
        rates = {}
        for entry in filter(None, (entry.strip() for entry in text.split(","))):
            name, _, number = entry.partition("=")
            if name not in {field.name for field in fields(cls)}:
                raise ValueError(f"no link {name!r} (known: {', '.join(field.name for field in fields(cls))})")
            rates[name] = float(number)
            if not 0 < rates[name] < float("inf"):
                raise ValueError(f"{entry}: bytes per second are more than 0, and a number")
        return cls(**rates)

    def rate(self, one: Place, other: Place) -> float:
        """A rack is the same only in the same zone, and a host only in the same rack, where both labels are told."""
        found = self.other
        for mine, theirs, rate in zip(one, other, (self.zone, self.rack, self.host), strict=True):
            if mine and theirs:
                if mine != theirs:
                    return found
                found = rate
        return found


def labels(given: Mapping[str, Any]) -> dict[str, str]:
    """`given` as the labels of an instance. Raises ValueError."""
    if wrong := [name for name, value in given.items() if name not in LABELS or not (isinstance(value, str) and value)]:
        raise ValueError(f"{wrong[0]}: an instance's labels are {', '.join(LABELS)}, each with a name")
    return dict(given)
