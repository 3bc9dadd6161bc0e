import pytest

from bench.simulator.clock import Clock
from bench.simulator.stations import Station


@pytest.mark.parametrize(("servers", "ends"), [(1, [1.0, 3.0, 6.0]), (2, [1.0, 2.0, 4.0]), (3, [1.0, 2.0, 3.0])])
def test_first_come_first_served_by_as_many_as_there_are(servers: int, ends: list[float]) -> None:
    clock, seen = Clock(), []
    station = Station(clock, servers)
    for seconds in (1.0, 2.0, 3.0):
        station.serve(seconds, lambda: seen.append(clock.now))
    clock.run()
    assert seen == ends


def test_what_was_cleared_never_ends_and_the_servers_are_free() -> None:
    clock, seen = Clock(), []
    station = Station(clock)
    for name in "ab":
        station.serve(2.0, seen.append, name)
    clock.at(1.0, station.clear)
    clock.at(1.5, station.serve, 1.0, seen.append, "after")
    clock.run()
    assert seen == ["after"]
    assert clock.now == 2.5
