"""How each engine family wants to be spoken to. A dialect shapes bodies and reads replies; it never orchestrates."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from proxy.core import Instance, Order
from proxy.dialects.ascend import Ascend
from proxy.dialects.base import Dialect, Options
from proxy.dialects.native import Native
from proxy.dialects.sglang import SELF_FED, Sglang
from proxy.dialects.vllm import Vllm

DIALECTS: dict[str, Callable[[Options, Instance], Dialect]] = {
    "native": lambda options, instance: Native(
        Order.SEQUENTIAL if options.order is Order.SEQUENTIAL else Order.DECODE_FIRST
    ),
    "ascend": lambda options, instance: Ascend(options.order),
    "vllm": Vllm,
    "sglang": Sglang,
}
"""By the name that `--dialect` and a URL's `name+http://` take."""

INLINE = frozenset({"ascend", "vllm", "sglang"})
"""Families whose engines have an encoder of their own: where no encoder is listed, whoever prefills gets the media."""

FEEDS: Mapping[str, frozenset[str]] = {
    "native": frozenset({"native", "vllm", "ascend"}),
    "sglang": frozenset({SELF_FED}),
}
"""Families whose engines read the embeddings of a family's encoders; other encoders feed their own family alone."""


class Speakers:
    """The dialect of each instance. It reads the instance's facts whenever it speaks, so that none is stale."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._known: dict[str, tuple[Instance, Dialect]] = {}

    def __call__(self, instance: Instance) -> Dialect:
        """Raises KeyError while the instance's dialect is "auto": it is not READY."""
        known = self._known.get(instance.url)
        if known is not None and known[0] is instance and known[1].name == instance.dialect:
            return known[1]
        dialect = DIALECTS[instance.dialect](self._options, instance)
        self._known[instance.url] = (instance, dialect)
        return dialect
