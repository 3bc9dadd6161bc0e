"""`triptych top`: a running proxy in a terminal, as its page shows it. Asks GET /ui/state, and computes nothing else.

q or Ctrl-C ends it; --once prints one frame, for a log or a pipe
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from deploy.asking import NoAnswer, told

State = Mapping[str, Any]

NAMES = {"encode": "Encode", "prefill": "Prefill", "decode": "Decode", "both": "Prefill + decode"}
COLOURS = {"encode": "medium_purple1", "prefill": "orange3", "decode": "cyan3", "both": "cornflower_blue"}
QUIET = "bright_black"
_BLOCKS = " ▁▂▃▄▅▆▇█"
_METER, _NAME = 14, 32  # cells at most; what stands beside them
_LEAST_LOAD = 2000  # tokens that a full meter stands for
_FRAME = 15  # lines without engines and requests
_CURVES = (
    ("requests", "served", "white"),
    ("first token", "ttft_p50", "white"),
    ("tokens", "tokens", COLOURS["decode"]),
)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 if the proxy did not answer the first time."""
    parser = argparse.ArgumentParser(
        prog="triptych top", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://localhost:8000", help="the proxy (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two looks (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    arguments = parser.parse_args(argv)
    console = Console()
    try:
        state = _state(arguments.url)
    except NoAnswer as error:
        print(f"triptych top: {error}", file=sys.stderr)
        return 1
    if arguments.once or not console.is_terminal:
        console.print(frame(state, console.width, 1000))
        return 0
    with suppress(KeyboardInterrupt), _keys() as pressed:
        _watch(arguments, console, state, pressed)
    return 0


def _state(url: str) -> State:
    return told(url, "/ui/state", has="curves")


def _watch(arguments: argparse.Namespace, console: Console, state: State, pressed: Pressed) -> None:
    lost = ""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(frame(state, console.width, console.height, lost), refresh=True)
            if "q" in pressed(arguments.interval):
                return
            try:
                state, lost = _state(arguments.url), ""
            except NoAnswer as error:
                lost = str(error)


class Pressed:
    """The keys that are pressed within so many seconds, until the first; none where there is no keyboard."""

    def __init__(self, keyboard: bool) -> None:
        self._keyboard = keyboard

    def __call__(self, seconds: float) -> str:
        if not self._keyboard:
            time.sleep(seconds)
            return ""
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return os.read(sys.stdin.fileno(), 64).decode(errors="ignore") if ready else ""


@contextmanager
def _keys() -> Iterator[Pressed]:
    """Within, keys are read one by one."""
    if not sys.stdin.isatty():
        yield Pressed(False)
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield Pressed(True)
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


# ---- what is drawn


def frame(state: State, width: int, height: int, lost: str = "") -> RenderableType:
    """All of it, for a terminal of this size. `lost`: why there is nothing newer."""
    roles = [role for role in NAMES if any(one["role"] == role for one in state["instances"])]
    most = max((sum(one["role"] == role for one in state["instances"]) for role in roles), default=0)
    engines = max(1, min(most, (height - _FRAME) // 2))
    requests = max(0, height - _FRAME - engines)
    parts = [_head(state, lost), _figures(state), _fleet(state, roles, width, engines), _curves(state, width)]
    return Padding(Group(*parts, _requests(state, width, requests), _plan(state)), (0, 1))


def _head(state: State, lost: str) -> RenderableType:
    models = sorted({one["model"] for one in state["instances"] if one["model"]})
    about = "  ".join([", ".join(models), _many(state["workers"], "worker"), f"version {state['version']}"])
    glyph = [("▌", COLOURS["encode"]), ("█", COLOURS["prefill"]), ("▐", COLOURS["decode"])]
    title = Text.assemble(*glyph, (" Triptych  ", "bold"), (about, QUIET))
    if lost:
        said = Text(f"● {lost}", "red", no_wrap=True, overflow="ellipsis")
    else:
        said = Text("● serving", "green") if state["ready"] else Text("● cannot serve", "red")
    line = Table.grid(expand=True)
    line.add_column(ratio=1, no_wrap=True)
    line.add_column(justify="right", ratio=1 if lost else None)
    line.add_row(title, said)
    return Padding(line, (0, 0, 1, 0))


def _figures(state: State) -> RenderableType:
    now = {name: values[-1] for name, values in state["curves"]["columns"].items()}
    ended = sum(now[name] for name in ("served", "left", "refused", "failed"))
    bad = now["refused"] + now["failed"]
    figures = [
        ("requests", f"{_rate(ended)}/s", f"{state['in_flight']} run, {state['queued']} wait"),
        ("first token", _span(now["ttft_p50"]), f"95 % within {_span(now['ttft_p95'])}"),
        ("per token", _span(now["token"]), f"answers {_span(now['e2e_p50'])}"),
        ("output", f"{_rate(now['tokens'])} tokens/s", f"{_rate(now['items'])} items/s"),
        ("not served", f"{bad / ended:.1%}" if ended else "–", f"{_rate(bad)}/s"),
    ]
    grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
    for _ in figures:
        grid.add_column(no_wrap=True, ratio=1)
    grid.add_row(*(Text(name, QUIET) for name, _, _ in figures))
    looks = ["bold"] * (len(figures) - 1) + ["bold red" if bad else "bold"]
    grid.add_row(*(Text(value, look) for (_, value, _), look in zip(figures, looks, strict=True)))
    grid.add_row(*(Text(note, QUIET) for _, _, note in figures))
    return Padding(grid, (0, 0, 1, 0))


def _fleet(state: State, roles: Sequence[str], width: int, lines: int) -> RenderableType:
    grid = Table.grid(expand=True, padding=(0, 3, 0, 0))
    for _ in roles:
        grid.add_column(ratio=1)
    room = width // max(1, len(roles)) - _NAME
    grid.add_row(*(_column(state, role, max(0, min(room, _METER)), lines) for role in roles))
    return Padding(grid, (0, 0, 1, 0))


def _column(state: State, role: str, room: int, lines: int) -> RenderableType:
    """Those in trouble first, the others as far as there is place; loads in `room` cells."""
    own = sorted((one for one in state["instances"] if one["role"] == role), key=lambda one: not _trouble(one))
    full = max(_LEAST_LOAD, *(one["load"] for one in own))
    busy = {need["role"]: need["utilisation"] for need in state["plan"].get("roles", ())}.get(role)
    said = _many(len(own), "engine") + (f", {busy:.0%} busy" if busy is not None else "")
    title = Text.assemble(
        (NAMES[role], f"bold {COLOURS[role]}"), (f"  {said}", QUIET), no_wrap=True, overflow="ellipsis"
    )
    table = Table.grid(expand=True, padding=(0, 1, 0, 0))
    table.add_column(ratio=1, no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right", min_width=3)
    shown = own if len(own) <= lines else own[: lines - 1]
    for one in shown:
        trouble = _trouble(one)
        name = Text.assemble(("● ", "red" if trouble else "green"), one["url"].partition("://")[2])
        work = Text(trouble, "red") if trouble else _meter(one["load"] / full, room, COLOURS[role])
        table.add_row(name, work, str(one["leases"] or ""))
    if len(shown) < len(own):
        table.add_row(Text(f"  and {len(own) - len(shown)} more", QUIET))
    return Group(title, table)


def _trouble(one: State) -> str:
    if one["state"] != "READY":
        return str(one["state"]).lower()
    return "" if one["circuit"] == "CLOSED" else f"circuit {one['circuit'].lower().replace('_', '-')}"


def _meter(part: float, room: int, colour: str) -> Text:
    full = round(part * room)
    return Text.assemble(("━" * full, colour), ("━" * (room - full), "grey23"))


def _curves(state: State, width: int) -> RenderableType:
    grid = Table.grid(expand=True, padding=(0, 3, 0, 0))
    for _ in _CURVES:
        grid.add_column(ratio=1, no_wrap=True)
    room = max(8, width // len(_CURVES) - 4)
    columns = [state["curves"]["columns"][column][-room:] for _, column, _ in _CURVES]
    minutes = room * state["curves"]["span"] / 60
    grid.add_row(*(Text(f"{name}, {minutes:.1f} min", QUIET) for name, _, _ in _CURVES))
    grid.add_row(*(Text(_spark(c), colour) for c, (_, _, colour) in zip(columns, _CURVES, strict=True)))
    return Padding(grid, (0, 0, 1, 0))


def _spark(values: Sequence[float | None]) -> str:
    top = max((value for value in values if value is not None), default=0) or 1
    return "".join(" " if value is None else _BLOCKS[round(value / top * (len(_BLOCKS) - 1))] for value in values)


def _requests(state: State, width: int, lines: int) -> RenderableType:
    latest = state["requests"][:lines]
    room = max(10, width - 54)
    full = sorted(one["seconds"] for one in latest)[int((len(latest) - 1) * 0.9)] if latest else 1.0
    table = Table.grid(expand=True, padding=(0, 2, 0, 0))
    for right in (False, False, True, True, False):
        table.add_column(no_wrap=True, justify="right" if right else "left")
    scale = Text.assemble("0", (" " * (room - 1 - len(_span(full)))), _span(full))
    table.add_row(*(Text(name, QUIET) for name in ("path", "what", "first", "total")), Text(str(scale), QUIET))
    for one in latest:
        table.add_row(one["path"], _what(one), _span(one["ttft"]), _span(one["seconds"]), _fall(one, full, room))
    return Padding(table, (0, 0, 1, 0))


def _what(one: State) -> Text:
    if one["status"] >= 400:
        left = one["status"] == 499
        return Text("client left", QUIET) if left else Text(f"{one['status']} {one['code'] or ''}", "red")
    items = f"{_many(one['items'], 'item')}, " if one["items"] else ""
    return Text(items + _many(one["output_tokens"], "token"))


def _fall(one: State, full: float, room: int) -> Text:
    """A cell for each part of `full` seconds, of the latest stage that is at work then."""
    cells: list[tuple[str, str]] = [(" ", "")] * room
    end = one["seconds"]
    for leg in sorted(one["legs"], key=lambda leg: ("encode", "prefill", "decode").index(leg["stage"])):
        begun = leg["first"] if leg["stage"] == "decode" and leg["first"] is not None else leg["began"]
        look = COLOURS[leg["stage"]] if leg["outcome"] in ("ok", "cancelled", None) else "red"
        first, last = (int(at / full * room) for at in (begun, leg["ended"] if leg["ended"] is not None else end))
        cells[first : last + 1] = [("━", look)] * len(cells[first : last + 1])
    return Text.assemble(*cells)


def _plan(state: State) -> RenderableType:
    plan = state["plan"]
    if "roles" not in plan:
        return Text(f"no plan: {plan['reason']}", QUIET)
    asked = f"asked for {_rate(plan['offered']['requests'])} requests/s, carries {_rate(plan['carries'])}; "
    advised = f"{NAMES[plan['bottleneck']]} gives way first; advised are {plan['ratio']}"
    if switch := plan.get("switch"):
        advised += f"; {switch['url'].partition('://')[2]} should be {switch['to']}"
    return Text(asked + advised, QUIET, no_wrap=True, overflow="ellipsis")


def _many(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _rate(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


if __name__ == "__main__":
    sys.exit(main())
