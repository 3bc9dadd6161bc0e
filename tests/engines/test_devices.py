from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engines.devices import PORTABLE, Beside, devices_of, into, onto, pinned
from engines.errors import SetupError


def test_several_devices_stand_between_commas() -> None:
    assert devices_of("cpu, cpu") == (torch.device("cpu"), torch.device("cpu"))


@pytest.mark.parametrize("name", ["abacus", "cpu,", "cuda:99"])
def test_a_device_that_is_not_here_is_refused_by_name(name: str) -> None:
    with pytest.raises(SetupError, match=f"--device {name.rpartition(',')[2]}"):
        devices_of(name)


class Cudart:
    """Stands for the CUDA runtime: what is registered, and with which answer."""

    def __init__(self, answer: int = 0) -> None:
        self.answer = answer
        self.registered: dict[int, tuple[int, int]] = {}

    def __call__(self) -> Any:
        return SimpleNamespace(cudaHostRegister=self.register, cudaHostUnregister=self.registered.pop)

    def register(self, address: int, nbytes: int, flags: int) -> int:
        if self.answer == 0:
            self.registered[address] = (nbytes, flags)
        return self.answer


def test_memory_is_pinned_as_long_as_the_block_and_can_be_unmapped_after_it() -> None:
    cudart = Cudart()
    memory = mmap.mmap(-1, 8192)
    buffer = memoryview(memory)
    address = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
    with pytest.raises(KeyError), pinned(buffer, torch.device("cuda:0"), cudart):
        assert cudart.registered == {address: (8192, PORTABLE)}
        raise KeyError
    assert cudart.registered == {}
    buffer.release()
    memory.close()


def test_memory_that_cannot_be_pinned_is_used_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    cudart, launched = Cudart(answer=2), list[torch.device]()

    def launch(device: torch.device) -> None:
        launched.append(device)
        raise RuntimeError("CUDA error: out of memory")

    with pinned(memoryview(bytearray(64)), torch.device("cuda:1"), cudart, launch) as buffer:
        assert buffer.nbytes == 64
    assert "64 bytes could not be pinned for cuda:1" in caplog.text
    assert launched == [torch.device("cuda:1")], "the next kernel would be blamed for it"


def test_on_a_cpu_there_is_nothing_to_pin() -> None:
    cudart = Cudart()
    with pinned(memoryview(bytearray(64)), torch.device("cpu"), cudart):
        assert cudart.registered == {}


def test_arrays_go_onto_the_cpu_without_a_copy() -> None:
    array = np.arange(6).reshape(2, 3)
    found = onto(array, torch.device("cpu"))
    array[1, 2] = 9
    assert found.tolist() == [[0, 1, 2], [3, 4, 9]]
    assert onto(array.T, torch.device("cpu")).tolist() == [[0, 3], [1, 4], [2, 9]]


def test_arrays_overwrite_what_a_tensor_holds() -> None:
    tensor = torch.zeros(2, 2, dtype=torch.int32)
    into(tensor, np.array([[1, 2], [3, 4]], np.int32))
    assert tensor.tolist() == [[1, 2], [3, 4]]


class Cuda:
    """Stands for `torch.cuda`: what its streams are told, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.made = 0

    def Stream(self, device: torch.device) -> Any:
        self.made += 1
        name = f"{device} {self.made}"
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.told.append(f"{name} waits for {other}"),
            synchronize=lambda: self.told.append(f"{name} is done"),
        )

    def default_stream(self, device: torch.device) -> str:
        return f"{device}'s first"

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.told.append(f"into {stream.name}")
        yield


def test_each_thread_has_one_stream_and_leaves_when_it_is_done() -> None:
    cuda = Cuda()
    beside = Beside(torch.device("cuda:1"), cuda)
    for _ in range(2):
        with beside():
            cuda.told.append("work")
    once = ["into cuda:1 1", "work", "cuda:1 1 is done"]
    assert cuda.told == ["cuda:1 1 waits for cuda:1's first", *once, *once]

    def other() -> None:
        with beside():
            pass

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert cuda.made == 2


def test_what_was_begun_is_waited_for_after_an_error_too() -> None:
    cuda = Cuda()
    with pytest.raises(KeyError), Beside(torch.device("cuda:0"), cuda)():
        raise KeyError
    assert cuda.told[-1] == "cuda:0 1 is done", "or the device would write where others write by then"


def test_a_cpu_has_no_streams() -> None:
    cuda = Cuda()
    with Beside(torch.device("cpu"), cuda)():
        pass
    assert cuda.told == []
