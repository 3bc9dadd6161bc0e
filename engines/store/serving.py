"""`triptych store`: a Mooncake Store for embeddings, its master and the memory they lie in, until a signal.

    triptych store --host 10.0.0.1 --bytes 64GiB                  # the master, and memory of this machine
    triptych store --host 10.0.0.2 --bytes 64GiB --join 10.0.0.1:50051      # more memory, of another
    triptych encoder --embedding-store 10.0.0.1:50051 …           # and language engines the same

Engines put and look, and hold no memory of it: what one has written outlives it. Nothing outlives this process; engines
compute again. Mooncake asks nobody for a key: keep its ports (this one, and those from 15000 to 17000) among engines.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ByteSize, TypeAdapter

from engines.errors import SetupError
from engines.store import client

START_SECONDS, LOOK_SECONDS = 20.0, 0.1
LEAST_BYTES = 16 << 20
"""Mooncake lends no less."""
PR_SET_PDEATHSIG = 1

_lent: list[Any] = []
"""Never destroyed: the library would wait for its master."""


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="triptych store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1", help="address of this machine that engines can reach")
    parser.add_argument(
        "--port", type=_port, default=50051, metavar="N", help="of the master; 0 lets the system choose"
    )
    parser.add_argument(
        "--bytes", type=_bytes, default="4GiB", help="memory for embeddings (%(default)s); the oldest make room"
    )
    parser.add_argument(
        "--lease", type=seconds, default=5.0, metavar="S", help="that one stays that was just read or written"
    )
    parser.add_argument(
        "--join", type=_master, metavar="HOST:PORT", help="add memory to this master instead of starting one"
    )
    parser.add_argument("--rdma", action="store_true", help="use RDMA, and refuse to start without it")
    parser.add_argument(
        "--metrics-port", type=_port, default=0, metavar="N", help="of the master's own /metrics; 0: any"
    )
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port")
    return int(text)


def seconds(text: str) -> float:
    """Of a lease; argparse tells this function's name where it raises ValueError."""
    found = float(text)
    if not 0 <= found < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds to keep anything for")
    return found


def _master(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host:
        raise argparse.ArgumentTypeError(f"{text!r} should look like HOST:PORT")
    return f"{host}:{_port(port)}"


def _bytes(text: str) -> int:
    try:
        nbytes = int(TypeAdapter(ByteSize).validate_python(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory: write 64GiB, for one") from None
    if nbytes < LEAST_BYTES:
        raise argparse.ArgumentTypeError(f"{text} is less than the {LEAST_BYTES >> 20}MiB that Mooncake lends at least")
    return nbytes


def master_command(host: str, port: int, lease: float, metrics_port: int) -> list[str]:
    """Raises SetupError when the wheel is not installed."""
    found = find_spec("mooncake")
    if found is None or not found.submodule_search_locations:
        raise SetupError("Mooncake is not installed: pip install 'triptych[mooncake]'")
    binary = Path(found.submodule_search_locations[0]) / "mooncake_master"
    flags = {
        "rpc_address": host,
        "rpc_port": port,
        "metrics_host": host,
        "metrics_port": metrics_port,
        "default_kv_lease_ttl": round(lease * 1000),
        "logtostderr": True,
        "minloglevel": 2,
    }
    return [str(binary), *(f"--{name}={value}" for name, value in flags.items())]


def free_port(host: str, port: int) -> int:
    """`port`, or for 0 any. Raises SetupError when somebody has it: the master would not say so."""
    try:
        with socket.create_server((host, port)) as server:
            return int(server.getsockname()[1])
    except OSError as error:
        raise SetupError(f"cannot serve on {host}:{port}: {error.strerror}; choose another --host or --port") from None


def main(argv: Sequence[str] | None = None) -> None:
    """Exits the process: 0 after a signal, 1 when the master has ended, 2 when it cannot start."""
    arguments = argument_parser().parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))  # the master goes with us
    try:
        master, address = (None, arguments.join) if arguments.join else _start_master(arguments)
        _lend(arguments.host, address, arguments.bytes, "rdma" if arguments.rdma else "tcp")
    except SetupError as error:
        print(f"triptych store: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    print(f"READY tcp://{address}", flush=True)
    while master is None or master.poll() is None:
        time.sleep(LOOK_SECONDS)  # a signal right before a wait without end would end it no more
    print(f"triptych store: the master ended with {master.returncode}", file=sys.stderr, flush=True)
    os._exit(1)


def _start_master(arguments: argparse.Namespace) -> tuple[subprocess.Popen[bytes], str]:
    port = free_port(arguments.host, arguments.port)
    command = master_command(arguments.host, port, arguments.lease, arguments.metrics_port)
    libc = ctypes.CDLL(None)
    master = subprocess.Popen(command, preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and master.poll() is None:
        try:
            socket.create_connection((arguments.host, port), timeout=1.0).close()
            return master, f"{arguments.host}:{port}"
        except OSError:
            time.sleep(0.02)
    master.kill()
    raise SetupError(f"the master does not serve on {arguments.host}:{port}: see its log above")


def _lend(host: str, master: str, nbytes: int, protocol: str) -> None:
    """Memory of this process, as long as it lives."""
    try:
        store = client.load(protocol)()
    except ImportError as error:
        raise SetupError(f"Mooncake cannot be loaded: {error}; apt-get install libibverbs1 libnuma1 libcurl4") from None
    if store.setup(host, "P2PHANDSHAKE", nbytes, 0, protocol, "", master) != 0:
        raise SetupError(f"{nbytes} bytes cannot be lent to the master at {master}: see its log above")
    _lent.append(store)
