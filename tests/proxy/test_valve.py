"""A sink that can be shut."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from proxy.valve import Valve


class Log:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.started = False
        self.sent = 0
        self.got: list[object] = []
        self.paused = True
        self.callbacks: list[Callable[[], None]] = []

    def begin(self, content_type: str, headers: Mapping[str, str], length: int | None, data: bytes) -> None:
        self.got.append((content_type, headers, length, data))

    def write(self, data: bytes) -> None:
        self.got.append(data)

    def end(self) -> None:
        self.got.append("end")

    def chunk_writer(self) -> Callable[[bytes], None]:
        return self.got.append

    def on_writable(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)


def test_open_it_is_the_sink_behind_it() -> None:
    log = Log()
    valve = Valve(log)
    assert not valve.started and valve.paused
    valve.begin("text/plain", {"a": "b"}, 3, b"x")
    valve.write(b"y")
    writer = valve.chunk_writer()
    assert writer is not None
    writer(b"z")
    valve.end()
    valve.on_writable(print)
    assert log.got == [("text/plain", {"a": "b"}, 3, b"x"), b"y", b"z", "end"]
    assert valve.started and log.callbacks == [print]


def test_shut_it_swallows_everything_and_never_pauses() -> None:
    log = Log()
    valve = Valve(log)
    valve.shut = True
    valve.begin("text/plain", {}, None, b"x")
    valve.write(b"y")
    valve.end()
    assert log.got == [] and valve.chunk_writer() is None and not valve.paused
