"""`triptych plan`: a running proxy's capacity plan as a table. Computes nothing: the proxy's GET /plan does."""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

_TIMEOUT_S = 10.0
_HEAD = ("role", "engines", "busy", "limit", "carries", "headroom", "one more", "advised")


class NoPlan(Exception):
    """There is no table to show; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 with a table, 1 without."""
    arguments = _parser().parse_args(argv)
    try:
        plan = fetched(arguments.url, arguments.engines)
        print(json.dumps(plan, indent=2) if arguments.json else table(arguments.url, plan))
    except NoPlan as error:
        print(f"triptych plan: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="triptych plan",
        description="How busy each role is, which gives way first, what one more engine buys.",
    )
    parser.add_argument("--url", default="http://localhost:8000", help="the proxy (default: %(default)s)")
    parser.add_argument("--engines", type=int, metavar="N", help="advise the best split of N engines")
    parser.add_argument("--json", action="store_true", help="print the proxy's answer instead of a table")
    return parser


def fetched(url: str, engines: int | None) -> dict[str, Any]:
    """The answer of the proxy at `url`. Raises NoPlan."""
    asked = url.rstrip("/") + "/plan" + ("" if engines is None else f"?engines={engines}")
    try:
        with urllib.request.urlopen(asked, timeout=_TIMEOUT_S) as response:
            plan = json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            raise NoPlan(f"{asked} answered {error.code}: {_said(error)}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NoPlan(f"{asked}: {getattr(error, 'reason', error)}") from None
    if not isinstance(plan, dict) or "offered" not in plan:
        raise NoPlan(f"{asked} is not a proxy of Triptych")
    return plan


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return error.reason


def table(url: str, plan: dict[str, Any]) -> str:
    """For people. Raises NoPlan."""
    if "roles" not in plan:
        idle = "no request has ended there in the last minutes" if not plan["offered"]["requests"] else plan["reason"]
        raise NoPlan(f"{url}: {idle}")
    rows = [_HEAD, *(_row(role) for role in plan["roles"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for role, row in zip([None, *plan["roles"]], rows, strict=True):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        marked = role is not None and role["role"] == plan["bottleneck"]
        lines.append("  ".join(cells) + ("  <- bottleneck" if marked else ""))
    asked, carried = plan["offered"]["requests"], plan["carries"]
    first = f"{url} is asked {_rate(asked)} requests/s and carries {_rate(carried)}"
    last = f"advised {plan['ratio']} carries {_rate(plan['would_carry'])}"
    return "\n".join([first, "", *lines, "", last])


def _row(role: dict[str, Any]) -> tuple[str, ...]:
    busy = "no engine" if role["utilisation"] is None else f"{role['utilisation']:.0%}"
    return (
        role["role"],
        str(role["engines"]),
        busy,
        f"{role['limit']:.0%}",
        _rate(role["carries"]),
        _rate(role["headroom"], "+"),
        _rate(role["one_more"], "+"),
        str(role["advised"]),
    )


def _rate(value: float | None, sign: str = "") -> str:
    """Of requests per second; None is without bound."""
    return "any" if value is None else f"{value:{sign}.3g}"


if __name__ == "__main__":
    sys.exit(main())
