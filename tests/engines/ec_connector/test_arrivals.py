"""Who waits for what: every way an embedding comes, fails or is no longer wanted."""

from __future__ import annotations

import random

import pytest

from engines.ec_connector.arrivals import SETTLED, Arrivals, Wanted

CAT, DOG = Wanted("cat", 5), Wanted("dog", 7)
ENTRY = {"where": "there"}


class Log:
    """`Deliveries` that only writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def order(self, wanted: Wanted) -> None:
        self.told.append(f"order {wanted.key}")

    def cancel(self, key: str) -> None:
        self.told.append(f"cancel {key}")

    def discard(self, key: str) -> None:
        self.told.append(f"discard {key}")

    def take(self) -> list[str]:
        told, self.told = self.told, []
        return told


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def arrivals(log: Log) -> Arrivals:
    return Arrivals(log, capacity=100)


def settle(arrivals: Arrivals) -> None:
    for _ in range(SETTLED + 1):
        arrivals.tick()


def test_a_request_waits_until_all_its_embeddings_are_here(arrivals: Arrivals, log: Log) -> None:
    assert not arrivals.ready("r", [CAT, DOG])
    assert log.take() == ["order cat", "order dog"], "both are under way from the first look"
    arrivals.arrived("dog", 10)
    assert not arrivals.ready("r", [CAT, DOG])
    arrivals.arrived("cat", 10)
    assert arrivals.ready("r", [CAT, DOG])
    assert log.take() == []
    assert "cat" in arrivals and "dog" in arrivals
    assert repr(arrivals) == "<Arrivals 0 ordered 2 here 0 failed, 1 requests>"


def test_requests_share_what_is_under_way_and_what_is_here(arrivals: Arrivals, log: Log) -> None:
    assert not arrivals.ready("a", [CAT])
    assert not arrivals.ready("b", [CAT])
    arrivals.arrived("cat", 10)
    assert arrivals.ready("a", [CAT]) and arrivals.ready("b", [CAT]) and arrivals.ready("c", [CAT])
    assert log.take() == ["order cat"]


def test_a_request_that_cannot_do_without_is_lost_once_and_ordered_anew_next_time(arrivals: Arrivals, log: Log) -> None:
    assert not arrivals.ready("r", [CAT])
    arrivals.failed("cat")
    assert not arrivals.ready("r", [CAT])
    assert arrivals.take_lost() == {"r"}
    assert arrivals.take_lost() == set()
    assert not arrivals.ready("again", [CAT])
    assert log.take() == ["order cat", "order cat"]
    arrivals.finished("r")
    assert log.take() == [], "the second one still waits for it"
    arrivals.arrived("cat", 10)
    assert arrivals.ready("again", [CAT])
    assert arrivals.take_lost() == set()


def test_media_of_which_nothing_was_said_is_encoded_at_once(arrivals: Arrivals, log: Log) -> None:
    assert arrivals.ready("r", [Wanted("cat", 5, encodable=True)])
    assert log.take() == []
    assert "cat" not in arrivals


def test_media_that_was_promised_is_waited_for_and_encoded_if_it_fails(arrivals: Arrivals, log: Log) -> None:
    promised = Wanted("cat", 5, ENTRY, encodable=True)
    assert not arrivals.ready("r", [promised])
    arrivals.failed("cat")
    assert arrivals.ready("r", [promised])
    assert "cat" not in arrivals
    assert arrivals.take_lost() == set()


def test_media_whose_embedding_happens_to_be_here_is_not_encoded_again(arrivals: Arrivals) -> None:
    arrivals.ready("first", [CAT])
    arrivals.arrived("cat", 10)
    assert arrivals.ready("r", [Wanted("cat", 5, encodable=True)])
    arrivals.finished("first")
    settle(arrivals)
    assert "cat" in arrivals


def test_what_nobody_waits_for_any_more_is_cancelled(arrivals: Arrivals, log: Log) -> None:
    arrivals.ready("a", [CAT, DOG])
    arrivals.ready("b", [CAT])
    log.take()
    arrivals.finished("a")
    assert log.take() == ["cancel dog"]
    arrivals.finished("b")
    assert log.take() == ["cancel cat"]
    arrivals.arrived("cat", 10)
    assert log.take() == ["discard cat"], "it came all the same"
    arrivals.failed("dog")
    arrivals.finished("unknown")
    assert repr(arrivals) == "<Arrivals 0 ordered 0 here 0 failed, 0 requests>"


def test_the_least_recently_wanted_goes_when_the_shelf_is_full_but_never_what_is_in_use(
    arrivals: Arrivals, log: Log
) -> None:
    for request, key in (("1", "a"), ("2", "b"), ("3", "c")):
        arrivals.ready(request, [Wanted(key, 1)])
        arrivals.arrived(key, 60)
    log.take()
    settle(arrivals)
    assert log.take() == [], "180 bytes, but all are in use"
    for request in "123":
        arrivals.finished(request)
    arrivals.ready("4", [Wanted("a", 1)])
    settle(arrivals)
    assert log.take() == ["discard b", "discard c"]
    arrivals.finished("4")
    settle(arrivals)
    assert log.take() == [], "60 bytes fit"


def test_nothing_goes_while_a_step_in_flight_may_still_read_it(log: Log) -> None:
    arrivals = Arrivals(log, capacity=0)
    arrivals.ready("r", [CAT])
    arrivals.arrived("cat", 10)
    arrivals.finished("r")
    for _ in range(SETTLED):
        arrivals.tick()
    assert "cat" in arrivals
    arrivals.tick()
    assert "cat" not in arrivals
    assert log.take() == ["order cat", "discard cat"]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_nothing_is_left_and_nothing_in_use_is_dropped(seed: int) -> None:
    dice, log = random.Random(seed), Log()
    arrivals = Arrivals(log, capacity=25)
    live: dict[str, list[Wanted]] = {}
    here: set[str] = set()
    for number in range(400):
        match dice.randrange(5):
            case 0:
                keys = dice.sample("abcdef", dice.randint(1, 3))
                live[str(number)] = [Wanted(key, 1, encodable=dice.random() < 0.2) for key in keys]
            case 1 if live:
                request = dice.choice(sorted(live))
                del live[request]
                arrivals.finished(request)
            case 2:
                arrivals.failed(dice.choice("abcdef"))
            case 3:
                arrivals.arrived(dice.choice("abcdef"), 10)
            case _:
                arrivals.tick()
        for request, wanted in live.items():
            if arrivals.ready(request, wanted):
                assert all(item.key in arrivals or item.encodable for item in wanted)
        before, here = here, {key for key in "abcdef" if key in arrivals}
        in_use = {item.key for wanted in live.values() for item in wanted}
        assert not (before - here) & in_use
        for request in arrivals.take_lost():
            arrivals.finished(request)
            del live[request]
    for request in live:
        arrivals.finished(request)
    settle(arrivals)
    assert repr(arrivals).endswith(" 0 failed, 0 requests>")
    assert "0 ordered" in repr(arrivals)
