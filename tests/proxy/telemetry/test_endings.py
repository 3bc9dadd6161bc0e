"""Records on their way to those who tell of them: soon, in order, each once."""

from __future__ import annotations

from proxy.record import Record
from proxy.telemetry.endings import Endings
from tests.support.waiting import until


async def test_whoever_watches_gets_all_soon_and_in_order() -> None:
    seen: list[tuple[str, str]] = []
    endings = Endings([lambda record: seen.append(("a", record.id)), lambda record: seen.append(("b", record.id))])
    for name in ("1", "2"):
        endings.ended(Record(name))
    assert not seen
    await until(lambda: seen)
    assert seen == [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")]
    endings.ended(Record("3"))
    await until(lambda: len(seen) > 4)
    assert seen[4:] == [("a", "3"), ("b", "3")]


async def test_many_do_not_wait_and_none_is_told_twice() -> None:
    seen: list[str] = []
    endings = Endings([lambda record: seen.append(record.id)])
    for number in range(100):
        endings.ended(Record(str(number)))
    assert len(seen) == 64
    endings.flush()
    endings.flush()
    assert seen == [str(number) for number in range(100)]
