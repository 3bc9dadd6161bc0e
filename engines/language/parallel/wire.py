"""Messages over a socket to a process of the same machine: each a length and its bytes. Ends in EOFError.

`Wire` is for threads that may block, `Line` for the loop.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Generic, TypeVar

import msgspec

LENGTH = struct.Struct("<Q")

In = TypeVar("In")


class Wire:
    """One end of a socket pair, used in one direction. Not thread-safe."""

    def __init__(self, end: socket.socket, timeout: float | None) -> None:
        """`timeout`: seconds for the other end to take, or give, some bytes; None: for ever."""
        self._socket = end
        self._socket.settimeout(timeout)

    def send(self, data: bytes) -> None:
        """Raises OSError: the other end is gone, or takes nothing."""
        self._socket.sendall(LENGTH.pack(len(data)) + data)

    def receive(self) -> bytearray:
        """Raises EOFError."""
        (length,) = LENGTH.unpack(self._read(LENGTH.size))
        return self._read(length)

    def _read(self, length: int) -> bytearray:
        data = bytearray(length)
        view = memoryview(data)
        while len(view):
            count = self._socket.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]
        return data

    def close(self) -> None:
        self._socket.close()


class Line(Generic[In]):
    """One end of a socket pair, used in both directions, for messages of one kind each."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: object) -> None:
        self._reader, self._writer = reader, writer
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[In] = msgspec.msgpack.Decoder(kind)

    @classmethod
    async def on(cls, end: socket.socket, kind: object) -> Line[In]:
        return cls(*await asyncio.open_unix_connection(sock=end), kind)

    def send(self, message: msgspec.Struct) -> None:
        """Never waits, never fails: whoever reads from the other end learns that it is gone."""
        data = self._encoder.encode(message)
        self._writer.write(LENGTH.pack(len(data)) + data)

    async def receive(self) -> In:
        try:
            (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            return self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError):
            raise EOFError from None

    def close(self) -> None:
        self._writer.close()
