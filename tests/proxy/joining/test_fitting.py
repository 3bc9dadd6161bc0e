"""Engines that are each well, and do not fit together."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.core import BOTH, Instance, Role
from proxy.joining.fitting import Engine, misfits


def engine(role: Role, at: str, dialect: str = "native", model: str = "m", version: str = "1", **info: Any) -> Engine:
    return Engine(Instance(f"http://{at}", role, dialect, model=model, facts={"version": version}), info)


def native(role: Role, at: str, transfer: str = "mooncake", **info: Any) -> Engine:
    return engine(role, at, transfer={"name": transfer}, **info)


def test_engines_that_fit_are_not_mentioned() -> None:
    fitting = [
        native(Role.ENCODE, "a:1"),
        *(native(role, "b:1", block_size=16) for role in (Role.PREFILL, Role.DECODE)),
    ]
    assert not [*misfits(fitting)]
    assert not [*misfits([native(BOTH, "a:1", "shm"), native(BOTH, "b:1", "zmq")])], "nothing is handed over"
    assert not [*misfits([engine(Role.PREFILL, "a:1", "vllm", ""), engine(Role.DECODE, "b:1", "vllm")])]
    assert not [*misfits([])]


@pytest.mark.parametrize(
    ("engines", "said", "fails"),
    [
        (
            [engine(Role.ENCODE, "a:1", model="x"), engine(BOTH, "b:1", model="y")],
            "engines serve different models: x at a:1; y at b:1",
            True,
        ),
        (
            [native(Role.ENCODE, "a:1", "zmq"), native(BOTH, "a:2"), native(BOTH, "a:3")],
            "engines hand over by different transports: mooncake at a:2, a:3; zmq at a:1",
            True,
        ),
        (
            [native(Role.ENCODE, "a:1", "shm"), native(BOTH, "b:1", "shm")],
            "shared memory reaches no other machine: a at a:1; b at b:1",
            True,
        ),
        (
            [native(Role.PREFILL, "a:1", block_size=16), native(Role.DECODE, "b:1", block_size=32)],
            "prefill and decode cut KV into blocks of different sizes: 16 at a:1; 32 at b:1",
            True,
        ),
        (
            [engine(BOTH, "a:1", "vllm", version="0.32"), engine(BOTH, "b:1", "vllm", version="0.33")],
            "vllm engines of different versions: 0.32 at a:1; 0.33 at b:1",
            False,
        ),
    ],
)
def test_what_does_not_fit_is_named_with_who_it_is(engines: list[Engine], said: str, fails: bool) -> None:
    (found,) = misfits(engines)
    assert (found.said, found.fails) == (said, fails) and found.advice
