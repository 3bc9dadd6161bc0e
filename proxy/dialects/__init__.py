"""How each engine family wants to be spoken to. A dialect shapes bodies and reads replies; it never orchestrates."""

from __future__ import annotations

from collections.abc import Callable

from proxy.core import Order
from proxy.dialects.base import Dialect
from proxy.dialects.native import Native

DIALECTS: dict[str, Callable[[Order], Dialect]] = {"native": Native}
"""By the name that `--dialect` and a URL's `name+http://` take."""

ENGINES = {"triptych": "native"}
"""The dialect of the engine that calls itself so in `GET /info`."""
