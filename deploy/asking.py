"""What a running proxy tells of itself, for the commands that show it. Changes nothing there."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

_TIMEOUT_S = 10.0


class NoAnswer(Exception):
    """The proxy told nothing; the message says why."""


def told(url: str, route: str, has: str) -> dict[str, Any]:
    """The JSON object that the proxy at `url` answers `route` with, which has a field `has`. Raises NoAnswer."""
    asked = url.rstrip("/") + route
    try:
        with urllib.request.urlopen(asked, timeout=_TIMEOUT_S) as response:
            found = json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            raise NoAnswer(f"{asked} answered {error.code}: {_said(error)}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NoAnswer(f"{asked}: {getattr(error, 'reason', error)}") from None
    if not isinstance(found, dict) or has not in found:
        raise NoAnswer(f"{asked} is not a proxy of Triptych")
    return found


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return error.reason
