"""A sink that can be shut."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from proxy.sglang.valve import Valve


class Log:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.started = False
        self.sent = 0
        self.got: list[object] = []
        self.throttled: tuple[Callable[[], None], Callable[[], None]] | None = None

    def begin(self, content_type: str, headers: Mapping[str, str], length: int | None, data: bytes) -> None:
        self.got.append((content_type, headers, length, data))

    def write(self, data: bytes) -> None:
        self.got.append(data)

    def end(self) -> None:
        self.got.append("end")

    def chunk_writer(self) -> Callable[[bytes], None]:
        return self.got.append

    def throttle(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        self.throttled = pause, resume


def test_open_it_is_the_sink_behind_it() -> None:
    log, told = Log(), list[str]()
    valve = Valve(log)
    assert not valve.started
    valve.begin("text/plain", {"a": "b"}, 3, b"x")
    valve.write(b"y")
    writer = valve.chunk_writer()
    assert writer is not None
    writer(b"z")
    valve.end()
    valve.throttle(lambda: told.append("pause"), lambda: told.append("resume"))
    assert log.throttled is not None
    for call in log.throttled:
        call()
    assert log.got == [("text/plain", {"a": "b"}, 3, b"x"), b"y", b"z", "end"]
    assert valve.started and told == ["pause", "resume"]


def test_shut_it_swallows_everything_and_never_pauses() -> None:
    log, told = Log(), list[str]()
    valve = Valve(log)
    writer = valve.chunk_writer()
    valve.throttle(lambda: told.append("pause"), lambda: told.append("resume"))
    valve.shut()
    assert told == ["resume"], "it may have been paused"
    valve.begin("text/plain", {}, None, b"x")
    valve.write(b"y")
    assert writer is not None and log.throttled is not None
    writer(b"z")
    valve.end()
    log.throttled[0]()
    assert log.got == [] and told == ["resume"]
    late = Valve(other := Log())
    late.shut()
    late.throttle(lambda: None, lambda: None)
    assert other.throttled is None, "the next answer's flow is not ours"
