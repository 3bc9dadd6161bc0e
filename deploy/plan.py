"""`triptych plan`: a running proxy's capacity plan as a table. Computes nothing: the proxy's GET /plan does."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from deploy.asking import NoAnswer, told

_HEAD = ("role", "engines", "busy", "limit", "carries", "headroom", "one more", "advised")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 with a table, 1 without."""
    arguments = _parser().parse_args(argv)
    try:
        wanted = "" if arguments.engines is None else f"?engines={arguments.engines}"
        plan = told(arguments.url, f"/plan{wanted}", has="offered")
        print(json.dumps(plan, indent=2) if arguments.json else table(arguments.url, plan))
    except NoAnswer as error:
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


def table(url: str, plan: dict[str, Any]) -> str:
    """For people. Raises NoAnswer."""
    if "roles" not in plan:
        idle = "no request has ended there in the last minutes" if not plan["offered"]["requests"] else plan["reason"]
        raise NoAnswer(f"{url}: {idle}")
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
    return "\n".join([first, "", *lines, "", last, *_switch(plan.get("switch"))])


def _switch(advised: dict[str, Any] | None) -> list[str]:
    if advised is None:
        return []
    carried = _rate(advised["would_carry"])
    return [f"with {advised['url']} turned from {advised['from']} to {advised['to']} it carries {carried}"]


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
