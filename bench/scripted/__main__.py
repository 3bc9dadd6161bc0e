"""`python -m bench.scripted --role decode --port 0 --interval 0.02`: one scripted engine, until SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys

import uvloop

from bench.scripted.engine import FAMILIES, ROLES, Engine, Pace


async def run(arguments: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    pace = Pace(arguments.delay, arguments.interval)
    async with Engine(arguments.role, pace, port=arguments.port, family=arguments.family) as engine:
        print(f"READY {engine.url}", flush=True)
        await stop.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scripted", description=__doc__)
    parser.add_argument("--role", choices=ROLES, required=True)
    parser.add_argument("--family", choices=FAMILIES, default="native")
    parser.add_argument("--port", type=int, default=0, help="0: any free one, named by the READY line")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before an answer begins")
    parser.add_argument("--interval", type=float, default=0.0, help="seconds between two tokens of a stream")
    uvloop.run(run(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
