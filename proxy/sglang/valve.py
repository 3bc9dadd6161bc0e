"""A sink that can be shut, behind which an answer goes on that nobody is to see."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from proxy.relay import Sink


class Valve:
    """A Sink. Once it is shut, what is written goes nowhere and the sink behind it is as it was."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._shut = False
        self._resume: Callable[[], None] | None = None
        self.started = False
        self.sent = 0  # the sink behind it counts

    def shut(self) -> None:
        """From now on nobody looks, and nobody is waited for."""
        self._shut = True
        if self._resume is not None:
            self._resume()

    def begin(self, content_type: str, headers: Mapping[str, str], length: int | None, data: bytes) -> None:
        self.started = True
        if not self._shut:
            self._sink.begin(content_type, headers, length, data)

    def write(self, data: bytes) -> None:
        if not self._shut:
            self._sink.write(data)

    def end(self) -> None:
        if not self._shut:
            self._sink.end()

    def chunk_writer(self) -> Callable[[bytes], None] | None:
        write = self._sink.chunk_writer()
        if write is None:
            return None

        def guarded(data: bytes) -> None:
            if not self._shut:
                write(data)

        return guarded

    def throttle(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        def guarded() -> None:
            if not self._shut:
                pause()

        if not self._shut:
            self._resume = resume
            self._sink.throttle(guarded, resume)
