"""Stands for `torch.cuda` where there is none: what streams, events and graphs are told, in order. Copies happen at
once, and work that is captured runs once, as it does when it is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


class Cuda:
    def __init__(self) -> None:
        self.told: list[str] = []
        self.streams = 0
        self.current = "default"

    def replace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda: dict[str, Callable[..., Any]] = {
            "Stream": self._stream,
            "Event": lambda blocking: Event(self, f"event(blocking={blocking})"),
            "CUDAGraph": lambda: Graph(self),
            "current_stream": lambda device: Stream(self, self.current),
            "stream": self._on,
            "device": self._device,
            "graph_pool_handle": lambda: "pool",
            "graph": self._capture,
        }
        for name, stand_in in cuda.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def _stream(self, device: torch.device) -> Stream:
        self.streams += 1
        return Stream(self, f"side{self.streams}")

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    @contextmanager
    def _device(self, device: torch.device) -> Iterator[None]:
        self.told.append(f"use {device}")
        yield

    @contextmanager
    def _capture(self, graph: Graph, pool: str, capture_error_mode: str) -> Iterator[None]:
        self.told.append(f"capture with {pool}, {capture_error_mode}")
        yield
        self.told.append("captured")


class Stream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self._cuda, self.name = cuda, name

    def wait_stream(self, other: Stream) -> None:
        self._cuda.told.append(f"{self.name} waits for {other.name}")

    def record_event(self, event: Event) -> Event:
        self._cuda.told.append(f"{self.name} records {event.name}")
        return event

    def wait_event(self, event: Event) -> None:
        self._cuda.told.append(f"{self.name} waits for {event.name}")


class Event:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self._cuda, self.name = cuda, name

    def synchronize(self) -> None:
        self._cuda.told.append(f"the host waits for {self.name}")


class Graph:
    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda

    def replay(self) -> None:
        self._cuda.told.append("replay")
