"""The context of a trace, as W3C's header `traceparent` carries it. Makes no spans and sends nothing.

00-<trace id, 32 hex digits>-<span id, 16>-<flags, 2: the last bit says that it is sampled>
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

Dice = Callable[[int], int]
"""As many random bits as asked for: random.getrandbits."""

_PARENT = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class Trace:
    """Where a request stands in its trace. `parent` is its caller's span, 0 if it has none that traces."""

    id: int
    span: int  # the request's own
    parent: int
    sampled: bool
    dice: Dice = field(compare=False, repr=False)

    def child(self) -> str:
        """The `traceparent` of a call that this request makes, with a span id of its own."""
        return f"00-{self.id:032x}-{_new(self.dice, 64):016x}-{self.sampled:02x}"

    def supersede(self, headers: dict[str, str]) -> None:
        """Take from `headers`, which engines are to get, what this stands in the place of."""
        headers.pop("traceparent", None)
        if not self.parent:
            headers.pop("tracestate", None)  # it belongs to a traceparent that is understood


def begin(parent: str, share: float, dice: Dice) -> Trace:
    """The context of a request that came with the header `parent`, and by its decision whether to sample it.

    Without one, or with one that is not to be understood, a trace begins; the `share` of these is sampled, chosen by
    the trace's id, so that whoever goes by the same share chooses the same.
    """
    found = parsed(parent)
    if found is None:
        made = _new(dice, 128)
        return Trace(made, _new(dice, 64), 0, (made & (1 << 64) - 1) < share * (1 << 64), dice)
    trace, span, sampled = found
    return Trace(trace, _new(dice, 64), span, sampled, dice)


def parsed(parent: str) -> tuple[int, int, bool] | None:
    """(trace id, span id, sampled) of a `traceparent`; None if it is none."""
    match = _PARENT.fullmatch(parent.strip())
    if match is None or (match[1] == "00" and match[5] is not None):
        return None
    trace, span = int(match[2], 16), int(match[3], 16)
    return (trace, span, bool(int(match[4], 16) & _SAMPLED)) if trace and span else None


def _new(dice: Dice, bits: int) -> int:
    """An id: anything but 0."""
    while not (found := dice(bits)):
        pass
    return found
