"""The devices that models run on, and host memory that they copy to and from. It allocates nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engines.errors import SetupError

log = logging.getLogger(__name__)

PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every device, not for the current one alone."""


def devices_of(names: str) -> tuple[torch.device, ...]:
    """What --device says: one name, or several with commas between them. Raises SetupError for one that is not here."""
    return tuple(_device(name.strip()) for name in names.split(","))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        raise SetupError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def onto(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array as a tensor on `device`, in the array's own memory on the CPU. Never waits for what a CUDA device has
    still to do: the copy leaves from pinned memory, behind it."""
    held = torch.from_numpy(np.ascontiguousarray(array))
    return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held.to(device)


def into(tensor: torch.Tensor, array: npt.NDArray[Any]) -> None:
    """Overwrite a tensor of the same shape, waiting for a CUDA device as little as `onto` does."""
    held = torch.from_numpy(array)
    if tensor.device.type == "cuda":
        held = held.pin_memory()
    tensor.copy_(held, non_blocking=True)


class Beside:
    """A stream for each thread that works on one device, so that a thread's work there waits for no other's. Devices
    without streams need nothing of the kind."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda
        self._own = threading.local()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within, what this thread has the device do goes to its stream; at the end, of an error too, all of that is
        done."""
        if self._device.type != "cuda":
            yield
            return
        stream = self._stream()
        try:
            with self._cuda.stream(stream):
                yield
        finally:
            stream.synchronize()

    def _stream(self) -> Any:
        if not hasattr(self._own, "stream"):  # kept: the allocator keeps memory for each stream
            self._own.stream = self._cuda.Stream(self._device)
            self._own.stream.wait_stream(self._cuda.default_stream(self._device))  # which loaded the weights
        return self._own.stream


def launch(device: torch.device) -> None:
    """The least that can be computed there."""
    torch.ones(1, device=device)


@contextmanager
def pinned(
    buffer: memoryview,
    device: torch.device,
    cudart: Callable[[], Any] = torch.cuda.cudart,
    launch: Callable[[torch.device], None] = launch,
) -> Iterator[memoryview]:
    """Within, copies between `buffer` (writable, page-aligned) and a CUDA device need no host thread: `non_blocking`
    ones return at once. For other devices nothing is done.

    Memory that CUDA will not pin stays as it is, which a log line says: copies are as right, and slower. No copy may
    be under way when the block ends, and `buffer` must still be mapped.
    """
    if device.type != "cuda":
        yield buffer
        return
    address = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
    error = cudart().cudaHostRegister(address, buffer.nbytes, PORTABLE)
    if int(error) != 0:
        # CUDA keeps an error until it is asked for its last one: the next kernel that anybody launched would be blamed.
        with suppress(RuntimeError):
            launch(device)
        log.warning("%d bytes could not be pinned for %s (%s): copies are slower", buffer.nbytes, device, error)
        yield buffer
        return
    try:
        yield buffer
    finally:
        cudart().cudaHostUnregister(address)
