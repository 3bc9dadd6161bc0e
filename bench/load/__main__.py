"""`triptych bench`, or `python -m bench.load`."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import inf
from typing import Any

import aiohttp
import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.load.arrivals import Pattern, drive
from bench.load.asking import CHAT, Broken, Outcome, ask, first_model
from bench.load.questions import Mixture, questions
from bench.load.results import Targets, failures, picture, routes, rows, summary
from bench.report import Report, add_arguments, align

_UNTIL_S = inf
_EXAMPLES = """\
examples:
  triptych bench --requests 200 --concurrency 8                      eight clients, each waiting for its answers
  triptych bench --rate 5 --seconds 60                               five requests a second, whatever becomes of them
  triptych bench --rate 5 --images 2 --image-size 1280x720 --image-share 0.5 --distinct 50
                                                                     half of them with two of fifty images
  triptych bench --url https://gpu.example --key sk-… --ttft-target 0.5 --tpot-target 0.05 --json --plot load.png
"""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="triptych bench",
        description="Asks an OpenAI-compatible URL and measures its answers. Times count from when a request was due.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--url", default="http://localhost:8000", help="with or without /v1 (default: %(default)s)")
    found.add_argument("--model", help="default: the first that the server names")
    found.add_argument("--key", help="sent as a bearer token")
    load = found.add_argument_group("load")
    load.add_argument("--requests", type=_count, help="default: 100, or as many as --seconds allow")
    load.add_argument("--seconds", type=_positive, help="begin no request after so many")
    load.add_argument("--rate", type=_positive, help="requests per second, at random; default: closed loop")
    load.add_argument("--concurrency", type=_count, help="requests open at once (default: 8; with --rate any number)")
    load.add_argument("--warm-up", type=int, default=1, metavar="N", help="requests before, not counted (default: 1)")
    load.add_argument("--timeout", type=_positive, default=300.0, help="seconds per request (default: 300)")
    load.add_argument("--seed", type=int, default=0, help="the same seed asks the same at the same times")
    asked = found.add_argument_group("requests")
    asked.add_argument("--words", type=_count, default=100, help="of each prompt (default: 100)")
    asked.add_argument("--max-tokens", type=_count, default=64, help="of each answer (default: 64)")
    asked.add_argument(
        "--may-stop", action="store_true", help="without ignore_eos and min_tokens: let the model end earlier"
    )
    asked.add_argument("--no-stream", action="store_true", help="whole answers; then only their ends are measured")
    asked.add_argument("--images", type=int, default=0, metavar="N", help="per request that has any (default: 0)")
    asked.add_argument("--image-share", type=_share, default=1.0, metavar="0..1", help="of requests that have images")
    asked.add_argument(
        "--image-size", type=_sizes, default=((640, 480),), metavar="WxH[,WxH]", help="in pixels, in turn"
    )
    asked.add_argument(
        "--distinct", type=_count, default=0, metavar="N", help="so many images, asked about again and again"
    )
    asked.add_argument("--extra", type=_object, metavar="JSON", help="fields to add to every request")
    targets = found.add_argument_group("targets", "requests per second that keep them are counted as good/s")
    targets.add_argument("--ttft-target", type=_positive, default=inf, metavar="S", help="seconds to the first token")
    targets.add_argument("--tpot-target", type=_positive, default=inf, metavar="S", help="seconds per output token")
    add_arguments(found)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 if every request was served, 1 if one was not, 2 if there was nothing to measure."""
    arguments = parser().parse_args(argv)
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        print("triptych bench: --plot needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    try:
        outcomes, seconds = asyncio.run(_run(arguments))
    except Broken as error:
        print(f"triptych bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    report = Report("load", picture=picture(outcomes))
    for row in rows(outcomes, seconds, Targets(arguments.ttft_target, arguments.tpot_target)):
        report.row(**row)
    _tell(outcomes, as_json=arguments.json)
    report.bar("requests not served", sum(bool(outcome.error) for outcome in outcomes), 0)
    return report.emit(arguments)


async def _run(arguments: argparse.Namespace) -> tuple[list[Outcome], float]:
    """Every outcome, and how long it took. Raises Broken."""
    base = arguments.url.rstrip("/").removesuffix("/v1")
    headers = {"content-type": "application/json"}
    if arguments.key:
        headers["authorization"] = f"Bearer {arguments.key}"
    limits = aiohttp.ClientTimeout(total=arguments.timeout)
    async with aiohttp.ClientSession(
        headers=headers, timeout=limits, connector=aiohttp.TCPConnector(limit=0), read_bufsize=1 << 20
    ) as session:
        model = arguments.model or await first_model(session, base)
        asked, send = questions(_mixture(arguments, model), arguments.seed), partial(ask, session, base + CHAT)
        warm = Pattern(arguments.warm_up, _UNTIL_S, None, 1)
        tried: list[Outcome] = []
        await drive(warm, asked, send, tried.append)
        if tried and all(outcome.error for outcome in tried):
            raise Broken(f"the warm-up was not served: {tried[-1].error}")
        pattern = _pattern(arguments)
        outcomes: list[Outcome] = []
        with _progress(pattern) as advance:

            def done(outcome: Outcome) -> None:
                outcomes.append(outcome)
                advance(outcomes)

            seconds = await drive(pattern, asked, send, done)
    return outcomes, seconds


def _mixture(arguments: argparse.Namespace, model: str) -> Mixture:
    return Mixture(
        model=model,
        words=arguments.words,
        tokens=arguments.max_tokens,
        images=arguments.images,
        share=arguments.image_share,
        sizes=arguments.image_size,
        distinct=arguments.distinct,
        stream=not arguments.no_stream,
        exact=not arguments.may_stop,
        extra=arguments.extra,
    )


def _pattern(arguments: argparse.Namespace) -> Pattern:
    many = sys.maxsize if arguments.seconds else 100
    clients = arguments.concurrency or (0 if arguments.rate else 8)
    seconds = arguments.seconds or _UNTIL_S
    return Pattern(arguments.requests or many, seconds, arguments.rate, clients, arguments.seed)


@contextmanager
def _progress(pattern: Pattern) -> Iterator[Any]:
    """A bar on a terminal's stderr; else a line in ten seconds would be noise, and nothing is shown."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    total = pattern.requests if pattern.requests < sys.maxsize else None
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("asking", total=total)
        yield lambda outcomes: bar.update(task, completed=len(outcomes), description=summary(outcomes))


def _tell(outcomes: Sequence[Outcome], *, as_json: bool) -> None:
    """Failures and paths, for people."""
    if ways := routes(outcomes):
        print("paths: " + ", ".join(f"{path} {count}" for path, count in ways.items()), file=sys.stderr)
    for line in align([{"failed": count, "what was said": said} for said, count in failures(outcomes)][:10]):
        if line:
            print(line, file=sys.stderr)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError("a whole number, at least 1")
    return int(text)


def _positive(text: str) -> float:
    if not (value := _number(text)) > 0:
        raise argparse.ArgumentTypeError("more than 0")
    return value


def _share(text: str) -> float:
    if not 0 <= (value := _number(text)) <= 1:
        raise argparse.ArgumentTypeError("between 0 and 1")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    try:
        found = tuple((int(w), int(h)) for w, h in (one.lower().split("x") for one in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError("looks like 640x480 or 640x480,1280x720") from None
    if any(min(size) < 1 for size in found):
        raise argparse.ArgumentTypeError("at least 1x1")
    return found


def _object(text: str) -> dict[str, Any]:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return found


if __name__ == "__main__":
    sys.exit(main())
