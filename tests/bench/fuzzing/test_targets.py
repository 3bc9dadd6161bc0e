from collections.abc import Iterator
from random import Random

import pytest

from bench.fuzzing import targets
from bench.fuzzing.peers import Connected
from bench.fuzzing.targets import Target
from proxy.sse import Event, Splitter
from tests.support.drawing import drawn


@pytest.fixture(scope="module")
def every() -> Iterator[list[Target]]:
    peers = Connected()
    yield targets.targets(peers)
    peers.close()


def test_every_target_takes_some_of_its_inputs_and_is_broken_by_none(every: list[Target]) -> None:
    assert len({target.name for target in every}) == len(every)
    for target in every:
        taken = [target.run(data, Random(n)) for n, data in enumerate(drawn(target.seeds(), 20))]
        assert any(taken), target.name


def test_a_splitter_that_loses_bytes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Splitter, "feed", lambda self, chunk: [Event(chunk[1:])])
    with pytest.raises(AssertionError, match="bytes were lost"):
        targets.events(b"data: x\n\n", Random(1))


def test_a_parser_that_fails_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.openai, "salt", lambda body, identity: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        targets.body(b'{"messages":[]}', Random(1))


def test_a_way_into_ones_own_network_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.Rules, "reachable", lambda self, address: True)
    with pytest.raises(AssertionError, match="let through"):
        targets.url(b"http://127.0.0.1/", Random(1))
    assert targets.url(b"http://8.8.8.8/", Random(1)) and targets.url(b"http://[2606:4700::1]:80/", Random(1))
