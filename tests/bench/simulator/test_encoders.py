import pytest

from bench.simulator.clock import Clock
from bench.simulator.encoders import Encode, Encoder, SimulatedEncoder
from bench.simulator.models import Cost
from bench.simulator.requests import Media


class Fixed:
    """One second in the host process, half a second on the GPU, 10 bytes."""

    def cost(self, media: Media) -> Cost:
        return Cost(100, 10, 1.0, 0.5)


def images(*names: str) -> list[Media]:
    return [Media(name, 1, 1) for name in names]


class Bench:
    def __init__(self, **spec: float) -> None:
        self.clock = Clock()
        self.encoder = SimulatedEncoder(self.clock, Encoder(Fixed(), **{"hit": 0.1, **spec}))
        self.ended: list[tuple[float, Encode]] = []
        self.failed: list[float] = []

    def encode(self, *names: str) -> None:
        self.encoder.encode(
            images(*names),
            lambda leg: self.ended.append((self.clock.now, leg)),
            lambda: self.failed.append(self.clock.now),
        )


def test_hosts_prepare_one_after_the_other_while_the_gpu_works() -> None:
    bench = Bench()
    bench.encode("a", "b", "c")
    bench.clock.run()
    (ended, leg), *_ = bench.ended
    assert ended == 3.5
    assert (leg.cached, leg.nbytes, leg.busy) == (set(), 30, 1.5)


@pytest.mark.parametrize(("batch", "ends"), [(8, [1.5, 2.5, 2.5]), (1, [1.5, 2.0, 2.5])])
def test_the_gpu_takes_what_is_ready_as_a_batch(batch: int, ends: list[float]) -> None:
    bench = Bench(hosts=3, batch=batch)
    for name in "abc":  # prepared at the same time: the first finds the GPU idle, and has it alone
        bench.encode(name)
    bench.clock.run()
    assert [at for at, _ in bench.ended] == ends


def test_what_is_cached_costs_a_hit_and_what_is_in_flight_is_encoded_once() -> None:
    bench = Bench()
    bench.encode("a")
    bench.encode("a")
    bench.clock.run()
    assert [(at, leg.cached) for at, leg in bench.ended] == [(1.5, set()), (1.5, {"a"})]
    bench.encode("a")
    bench.clock.run()
    assert bench.ended[-1][0] == pytest.approx(1.6)
    assert bench.encoder.holds("a")


def test_the_cache_is_bounded_by_bytes() -> None:
    bench = Bench(cache_bytes=20)
    bench.encode("a", "b", "c")
    bench.clock.run()
    assert [bench.encoder.holds(name) for name in "abc"] == [False, True, True]


def test_a_slow_encoder_takes_longer() -> None:
    bench = Bench()
    bench.encoder.slowness = 2.0
    bench.encode("a")
    bench.clock.run()
    assert bench.ended[0][0] == 3.0


def test_a_killed_encoder_fails_what_is_in_work_and_forgets() -> None:
    bench = Bench()
    bench.encode("a")
    bench.clock.at(1.6, bench.encode, "b")
    bench.clock.at(2.7, bench.encoder.kill)
    bench.clock.run()
    assert [at for at, _ in bench.ended] == [1.5]
    assert bench.failed == [2.7]
    assert not bench.encoder.alive
    assert not bench.encoder.holds("a")
    bench.encoder.restart()
    bench.clock.at(5.0, bench.encode, "b")
    bench.clock.run()
    assert bench.ended[-1][0] == 6.5
