"""A sink that can be shut, behind which an answer goes on that nobody is to see."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from proxy.relay import Sink


class Valve:
    """A Sink. Once `shut`, what is written goes nowhere and the sink behind it is as it was."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.shut = False
        self.started = False
        self.sent = 0  # the sink behind it counts

    def begin(self, content_type: str, headers: Mapping[str, str], length: int | None, data: bytes) -> None:
        self.started = True
        if not self.shut:
            self._sink.begin(content_type, headers, length, data)

    def write(self, data: bytes) -> None:
        if not self.shut:
            self._sink.write(data)

    def end(self) -> None:
        if not self.shut:
            self._sink.end()

    def chunk_writer(self) -> Callable[[bytes], None] | None:
        """None where it is shut: whole chunks would pass unseen."""
        return None if self.shut else self._sink.chunk_writer()

    @property
    def paused(self) -> bool:
        return not self.shut and self._sink.paused

    def on_writable(self, callback: Callable[[], None]) -> None:
        self._sink.on_writable(callback)
