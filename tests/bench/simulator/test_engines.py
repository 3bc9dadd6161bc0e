"""A simulated engine, beside one that computes every step on its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest

from bench.simulator.clock import Clock
from bench.simulator.engines import Engine, Generation, Part, SimulatedEngine
from bench.simulator.models import Cost, Linear
from bench.simulator.requests import Media

LANGUAGE = Linear(1, 1, per_token=1e-3, fixed=2e-3, step_fixed=5e-3, per_sequence=1e-3, per_kv=1e-6)


class Fixed:
    def cost(self, media: Media) -> Cost:
        return Cost(100, 10, 1.0, 0.5)


@dataclass
class Bench:
    spec: Engine
    generates: bool = True
    clock: Clock = field(default_factory=Clock)
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine = SimulatedEngine(self.clock, self.spec, self.generates)

    def made(self, name: str, parts: tuple[Part, ...], output: int) -> Generation:
        return Generation(
            parts,
            output,
            lambda _: self.first.setdefault(name, self.clock.now),
            lambda _: self.last.setdefault(name, self.clock.now),
            lambda: self.failed.append(name),
        )

    def text(self, name: str, prompt: int, output: int = 1) -> Generation:
        return self.made(name, (Part(name, prompt),), output)


def stepwise(arrivals: list[tuple[float, int, int]], chunk: int) -> list[tuple[float, float]]:
    """(first, last) of each (arrival, prompt, output), with one event per token."""
    now, first, last = 0.0, [0.0] * len(arrivals), [0.0] * len(arrivals)
    computed = [0] * len(arrivals)
    running: dict[int, int] = {}
    while not all(last):
        waiting = [n for n, (at, prompt, _) in enumerate(arrivals) if at <= now and computed[n] < prompt]
        if waiting:
            budget, ended, tokens = chunk, [], 0
            for n in waiting:
                count = min(budget, arrivals[n][1] - computed[n])
                computed[n] += count
                budget, tokens = budget - count, tokens + count
                if count and computed[n] == arrivals[n][1]:
                    ended.append(n)
            now += LANGUAGE.prefill(tokens, 0)
            for n in ended:
                first[n], running[n] = now, 1
                if arrivals[n][2] == 1:
                    last[n] = now
                    del running[n]
        elif running:
            now += LANGUAGE.step(len(running), sum(arrivals[n][1] + done for n, done in running.items()))[0]
            for n in list(running):
                running[n] += 1
                if running[n] == arrivals[n][2]:
                    last[n] = now
                    del running[n]
        else:
            now = min(at for n, (at, _, _) in enumerate(arrivals) if not computed[n])
    return list(zip(first, last, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_steps_taken_together_end_when_they_would_one_by_one(seed: int) -> None:
    dice = Random(seed)
    arrivals, at = [], 0.0
    for _ in range(30):
        at += dice.expovariate(dice.choice((2.0, 20.0)))
        arrivals.append((at, dice.randint(1, 300), dice.choice((1, 2, 5, 80))))
    bench = Bench(Engine(LANGUAGE, chunk=dice.choice((64, 256))))
    for number, (at, prompt, output) in enumerate(arrivals):
        bench.clock.at(at, bench.engine.prefill, bench.text(str(number), prompt, output))
    bench.clock.run()
    for number, (first, last) in enumerate(stepwise(arrivals, bench.spec.chunk)):
        assert bench.first[str(number)] == pytest.approx(first)
        assert bench.last[str(number)] == pytest.approx(last)


def test_prefill_stops_decoding_between_two_steps() -> None:
    bench = Bench(Engine(LANGUAGE))
    bench.engine.prefill(bench.text("long", 10, 1000))
    bench.clock.at(0.5, bench.engine.prefill, bench.text("next", 10))
    bench.clock.run()
    step = LANGUAGE.step(1, 50)[0]
    assert 0.5 < bench.first["next"] - LANGUAGE.prefill(10, 0) < 0.5 + step


def test_with_mixed_steps_decoding_goes_on_beside_chunks() -> None:
    ends = []
    for mixed in (False, True):
        bench = Bench(Engine(LANGUAGE, chunk=10, mixed=mixed))
        bench.engine.prefill(bench.text("first", 10, 20))
        bench.clock.at(0.02, bench.engine.prefill, bench.text("long", 1000))
        bench.clock.run()
        ends.append(bench.last["first"] < bench.first["long"])
    assert ends == [False, True]


def test_nothing_begins_without_room_for_all_of_its_kv() -> None:
    bench = Bench(Engine(LANGUAGE, kv_tokens=150))
    for name in ("a", "b"):
        bench.engine.prefill(bench.text(name, 50, 50))
    bench.engine.prefill(bench.text("larger than all", 500, 2))
    bench.clock.run()
    assert bench.first["b"] > bench.last["a"]
    assert bench.first["larger than all"] > bench.last["b"]


def test_room_is_given_back_while_others_run() -> None:
    bench = Bench(Engine(LANGUAGE, kv_tokens=1190))
    for name, output in (("short", 10), ("long", 1000), ("next", 10)):
        bench.engine.prefill(bench.text(name, 60, output))
    bench.clock.run()
    assert bench.last["short"] < bench.first["next"] < bench.last["long"]


def test_images_encoded_inline_stall_the_loop_once_each() -> None:
    bench = Bench(Engine(LANGUAGE, Fixed()))
    parts = (Part("i", 100, Media("cat", 1, 1)), Part("it", 110))
    for name in ("once", "again"):
        generation = bench.made(name, parts, 1)
        bench.clock.at(0.0 if name == "once" else 10.0, bench.engine.prefill, generation)
    bench.clock.run()
    assert bench.first["once"] == pytest.approx(1.0 + 0.5 + LANGUAGE.prefill(110, 0))
    assert bench.first["again"] == pytest.approx(10.0 + LANGUAGE.prefill(110, 0))


def test_an_engine_that_cannot_see_says_so() -> None:
    bench = Bench(Engine(LANGUAGE))
    generation = bench.made("x", (Part("i", 100, Media("cat", 1, 1)),), 1)
    with pytest.raises(ValueError, match="without a vision model"):
        bench.engine.prefill(generation)


def test_a_prompt_that_begins_like_another_is_computed_from_there() -> None:
    bench = Bench(Engine(LANGUAGE, prefix_tokens=1000))
    one = bench.made("one", (Part("s", 400), Part("s1", 500)), 1)
    two = bench.made("two", (Part("s", 400), Part("s2", 450)), 1)
    same = bench.made("same", (Part("s", 400), Part("s1", 500)), 1)
    for at, generation in enumerate((one, two, same)):
        bench.clock.at(float(at), bench.engine.prefill, generation)
    bench.clock.run()
    assert (one.cached, two.cached, same.cached) == (0, 400, 499)
    assert bench.first["two"] == pytest.approx(1 + LANGUAGE.prefill(50, 0))


def test_a_prefill_engine_lets_go_with_the_first_token_and_decode_goes_on_elsewhere() -> None:
    bench = Bench(Engine(LANGUAGE), generates=False)
    bench.engine.prefill(bench.text("a", 10, 5))
    bench.clock.run()
    assert bench.first == bench.last
    elsewhere = Bench(Engine(LANGUAGE))
    elsewhere.engine.decode(elsewhere.text("a", 10, 5))
    elsewhere.clock.run()
    assert elsewhere.first["a"] == 0.0
    assert elsewhere.last["a"] == pytest.approx(sum(LANGUAGE.step(1, kv)[0] for kv in (11, 12, 13, 14)))


def test_only_what_is_available_is_computed() -> None:
    bench = Bench(Engine(LANGUAGE))
    generation = bench.text("a", 100)
    generation.available = 40
    bench.engine.prefill(generation)
    bench.clock.at(5.0, bench.engine.extend, generation, 100)
    bench.clock.run()
    assert bench.first["a"] == pytest.approx(5.0 + LANGUAGE.prefill(60, 40))


def test_a_killed_engine_fails_all_that_is_there_and_begins_anew() -> None:
    bench = Bench(Engine(LANGUAGE, prefix_tokens=1000))
    bench.engine.prefill(bench.text("runs", 10, 1000))
    bench.clock.at(0.1, bench.engine.prefill, bench.text("prefills", 1000))
    bench.clock.at(0.2, bench.engine.prefill, bench.text("waits", 100))
    bench.clock.at(0.3, bench.engine.kill)
    bench.clock.run()
    assert bench.failed == ["runs", "prefills", "waits"]
    assert not bench.engine.alive
    bench.engine.restart()
    again = bench.text("again", 10, 3)
    bench.engine.prefill(again)
    bench.clock.run()
    assert again.cached == 0
    assert bench.last["again"] > bench.first["again"] > 0.3


def test_what_is_cancelled_gives_its_room_back_and_never_ends() -> None:
    bench = Bench(Engine(LANGUAGE, kv_tokens=150))
    bench.engine.prefill(bench.text("stays", 20, 2000))
    half = bench.text("half", 100)
    half.available = 40
    late = bench.text("late", 60)
    bench.clock.at(0.1, bench.engine.prefill, half)
    bench.clock.at(0.2, bench.engine.prefill, late)
    bench.clock.at(5.0, bench.engine.cancel, half)
    bench.clock.at(5.0, bench.engine.cancel, half)
    bench.clock.run()
    assert set(bench.last) == {"stays", "late"}


def test_what_is_cancelled_before_its_images_are_prepared_never_begins() -> None:
    bench = Bench(Engine(LANGUAGE, Fixed()))
    generation = bench.made("x", (Part("i", 100, Media("cat", 1, 1)),), 1)
    bench.engine.prefill(generation)
    bench.clock.at(0.5, bench.engine.cancel, generation)
    bench.clock.run()
    assert bench.first == {}


def test_a_prompt_is_available_up_to_the_first_image_that_is_missing() -> None:
    bench = Bench(Engine(LANGUAGE))
    parts = (Part("t", 10), Part("i", 110, Media("cat", 1, 1)), Part("j", 210, Media("dog", 1, 1)), Part("u", 220))
    generation = bench.made("x", parts, 1)
    generation.delivered = {"cat"}
    assert generation.up_to(()) == 10
    assert generation.up_to({"cat"}) == 220
    assert generation.inline() == [(210, Media("dog", 1, 1))]
