"""Which engines can take part in one path: prefill and decode of one family, and encoders that it understands. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from proxy.core import BOTH, Instance, Role

UNKNOWN = "auto"
"""The dialect of an instance that has not been asked yet."""


@dataclass(frozen=True, slots=True)
class Families:
    """What engine families (`Instance.dialect`) can do for each other: `proxy.dialects` knows."""

    inline: Collection[str] = ()  # whose engines encode media where no encoder is listed
    feeds: Mapping[str, Collection[str]] = field(default_factory=dict)  # by an encoder's family; absent: its own alone

    def fit(self, instance: Instance, family: str, listed: Collection[str] = ()) -> bool:
        """Whether `instance` can take part in a path of `family`.

        An encoder beside engines of its own family, which is among those `listed` then, sends embeddings as these read
        them: it feeds no other.
        """
        if instance.role is Role.ENCODE and (fed := self.feeds.get(instance.dialect)):
            own = instance.dialect in fed and instance.dialect in listed
            return family == instance.dialect if own else family in fed
        return instance.dialect == family

    def stray(self, instance: Instance, listed: Iterable[Instance]) -> str | None:
        """Why `instance` can never serve among `listed`, if another family can; None while one of them is unknown."""
        roles: dict[str, set[Role]] = {}
        for other in listed:
            if other.role is not Role.ENCODE:
                roles.setdefault(other.dialect, set()).add(other.role)
        complete = [name for name, has in roles.items() if BOTH in has or {Role.PREFILL, Role.DECODE} <= has]
        if UNKNOWN in roles or instance.dialect in complete or any(self.fit(instance, name) for name in complete):
            return None
        others = sorted(roles.keys() - {instance.dialect})
        if not others:
            return None
        return (
            f"it speaks {instance.dialect}, and a path is never of two families: among {', '.join(others)} engines it "
            "needs prefill and decode engines of its own (or, if it was taken for what it is not, its dialect before "
            "its URL, as in native+http://host:port)"
        )
