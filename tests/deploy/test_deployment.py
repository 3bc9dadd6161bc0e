import argparse
import asyncio
from pathlib import Path
from typing import cast

import pytest

from deploy.deployment import Deployment, Topology
from deploy.processes import Child, StartError


@pytest.mark.parametrize(
    ("text", "topology"),
    [
        ("1e1p1d", Topology(1, 1, 1)),
        ("2E3p4d", Topology(2, 3, 4)),
        ("1e2pd", Topology(1, both=2)),
        ("1p1d", Topology(0, 1, 1)),
        ("1pd", Topology(both=1)),
        ("2epd", Topology(whole=2)),
    ],
)
def test_a_topology_is_read(text: str, topology: Topology) -> None:
    assert Topology.parse(text) == topology


@pytest.mark.parametrize(
    "text", ["", "e", "1e", "1p", "1d", "0p1d", "1e0pd", "0e1pd", "1e1p1d1pd", "3", "1p1e1d", "0epd", "1e1epd"]
)
def test_a_topology_that_cannot_serve_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        Topology.parse(text)


def test_engines_are_named_by_role() -> None:
    names = [name for name, _ in Topology(2, 1, 1).engines()]
    assert names == ["encode-0", "encode-1", "prefill-0", "decode-0"]


def test_all_engines_are_told_of_the_store() -> None:
    deployment = Deployment(Path("m"), Topology(1, 1, 1), embedding_store="1GiB")
    deployment.store = Child("store", "engines.store", [])
    deployment.store.url = "tcp://127.0.0.1:50051"
    for name, role in deployment.topology.engines():
        assert "--embedding-store 127.0.0.1:50051" in " ".join(deployment._engine(name, role)._command)
    assert deployment.store in deployment._behind_the_proxy()


def test_the_role_arguments_come_after_the_common_ones() -> None:
    deployment = Deployment(
        Path("m"),
        Topology(1, 1, 1),
        engine_arguments=["--log-level", "debug"],
        role_arguments={"decode": ["--port", "7"]},
    )
    decode = " ".join(deployment._engine("decode-0", "decode")._command)
    assert decode.endswith("--log-level debug --role decode --port 7")
    whole = " ".join(deployment._engine("whole-0", "whole")._command)
    assert whole.endswith("--role both --encode --port 0")
    assert deployment._engine("encode-0", "encode")._command[2:4] == ["engines.encoder", "--model"]


class Frail:
    """A child that ends `deaths` times, while it starts or later, and then stays."""

    name, url, last_lines = "decode-0", "http://here", "out of memory"

    def __init__(self, deaths: int) -> None:
        self.deaths = deaths
        self.starts = 0
        self.stays = asyncio.Event()

    async def wait(self) -> int:
        if self.starts >= self.deaths:
            self.stays.set()
            await asyncio.Event().wait()
        return -9

    def keep_port(self) -> None: ...

    async def start(self, _timeout: float) -> str:
        self.starts += 1
        if self.starts < self.deaths:
            raise StartError(f"{self.name} ended with -9")
        return self.url


async def test_an_engine_that_dies_while_it_starts_again_is_started_again() -> None:
    child = Frail(deaths=3)
    watcher = asyncio.ensure_future(Deployment(Path("m"), Topology(both=1), restarts=3)._watch(cast(Child, child)))
    async with asyncio.timeout(5):
        await child.stays.wait()
    watcher.cancel()
    assert child.starts == 3


async def test_one_that_dies_too_often_is_left_down() -> None:
    child = Frail(deaths=9)
    async with asyncio.timeout(5):
        await Deployment(Path("m"), Topology(both=1), restarts=3)._watch(cast(Child, child))
    assert child.starts == 3
