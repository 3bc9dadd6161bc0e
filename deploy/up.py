"""`triptych up`: a whole deployment on this machine, until Ctrl-C.

For more machines than one, start `triptych encoder`, `triptych language` and `triptych proxy` on each yourself.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path

from deploy.deployment import Deployment, Topology, say
from deploy.processes import StartError

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


async def tiny_checkpoint(family: str, folder: Path) -> Path:
    """Make the family's tiny checkpoint once; later calls find it."""
    if not (folder / "config.json").exists():
        say(f"making a tiny random {family} checkpoint in {folder}")
        command = [sys.executable, "-m", "engines.checkpoint", "--family", family, "--out", str(folder)]
        quiet = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=asyncio.subprocess.STDOUT)
        output, _ = await process.communicate()
        if process.returncode:
            raise StartError(f"making the checkpoint failed:\n{output.decode()}")
    return folder


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="triptych up",
        description="Start encoder, prefill and decode engines and the proxy on this machine, until Ctrl-C.",
    )
    parser.add_argument(
        "--topology", type=Topology.parse, default="1e1p1d", help="1e1p1d, 2e1p2d, 1e1pd, 2epd, 1p1d, 1pd …"
    )
    parser.add_argument(
        "--model", type=Path, help="a Hugging Face folder; default: a tiny random checkpoint, made once"
    )
    parser.add_argument("--family", choices=FAMILIES, default="qwen3_vl", help="family of the tiny checkpoint")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="the proxy's; 0 lets the system choose")
    parser.add_argument("--transfer", choices=["shm", "mooncake", "zmq"], default="shm", help="how tensors travel")
    parser.add_argument("--kv-handoff", choices=["push", "pull"], default="push", help="who moves the KV cache")
    parser.add_argument(
        "--embedding-store", nargs="?", const="1GiB", default="", metavar="BYTES",
        help="let engines share what encoders computed, in so much memory of a store of its own (default: %(const)s)",
    )  # fmt: skip
    parser.add_argument(
        "--start-timeout", type=float, default=600.0, metavar="S", help="seconds an engine may take to load"
    )
    parser.add_argument("--verbose", action="store_true", help="show the log lines of every process")
    return parser


async def run(arguments: argparse.Namespace) -> None:
    model = arguments.model or await tiny_checkpoint(arguments.family, Path(".checkpoints") / arguments.family)
    deployment = Deployment(
        model=model, topology=arguments.topology, host=arguments.host, port=arguments.port, transfer=arguments.transfer,
        kv_handoff=arguments.kv_handoff, embedding_store=arguments.embedding_store,
        start_timeout=arguments.start_timeout, verbose=arguments.verbose,
    )  # fmt: skip
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with deployment:
        deployment.keep_alive()
        print(f"READY {deployment.url}", flush=True)
        say(f"point an OpenAI client at {deployment.url}/v1 (any API key); Ctrl-C stops everything")
        assert deployment.proxy is not None
        ends = [asyncio.create_task(stopped.wait()), asyncio.create_task(deployment.proxy.wait())]  # noqa: TID251 - below
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in ends:
            task.cancel()
        if not stopped.is_set():
            raise StartError(f"the proxy ended with {deployment.proxy.returncode}:\n{deployment.proxy.last_lines}")


def main() -> None:
    try:
        asyncio.run(run(argument_parser().parse_args()))
    except StartError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
