"""What a leg's end teaches, and what it does not: each leg's rate once, hits no rate, failures nothing of speed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from proxy.balancer.caches import hit
from proxy.balancer.pace import SEQUENCE, STEP, TOKEN
from proxy.balancer.policy import Demand
from proxy.breaker import Breakers, Thresholds
from proxy.core import BOTH, Api, Handle, Item, Job, Leg, Role
from proxy.lessons import Lessons, ahead, charged, generated
from proxy.media.costs import Costs
from proxy.planning.plan import Held
from tests.fakes.deployment import Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, image, part
from tests.support.balancing import balancer, pool

JOB = Job("r", Api.CHAT, {"model": "m"}, (), 100, 50, True, text_bytes=400)
LEAST, MOST = 4, 100  # tokens of a small picture, or of a prompt with one
HOST = {Role.ENCODE: "http://e", Role.PREFILL: "http://p", Role.DECODE: "http://d", BOTH: "http://b"}


class School:
    """A balancer that lessons teach, with one instance for each role."""

    def __init__(self) -> None:
        self.balancer, self.costs = balancer(), Costs()
        self.lessons = Lessons(self.balancer, self.costs)
        self.permit = Breakers(Thresholds(1, 1.0)).permit("http://x")

    def leg(self, role: Role, *works: int, items: tuple[Item, ...] = ()) -> Leg:
        candidates = pool([HOST[role]], role)
        leases = [self.balancer.ledger.lease(candidates.by_url[HOST[role]], role, work) for work in works]
        return Leg(role, leases[0].instance, items, Held(leases, self.permit))

    def rate(self, role: Role) -> float:
        return self.balancer.rates[role].seconds(HOST[role])

    def observed(self, role: Role) -> int:
        count: int = self.balancer.rates[role].shown(HOST[role])["observations"]
        return count


def item(name: str, work: int = 100, index: int = 0) -> Item:
    return Item(index, 0, index, "image", {}, None, name, work, work)


def handle(**entry: Any) -> Handle:
    return Handle("h", "image", {"image_grid_thw": [1, 4, 8]}, entry)


def test_what_is_ahead_of_a_leg_is_all_that_others_have_there() -> None:
    school = School()
    assert ahead(school.leg(Role.PREFILL, 300)) == 0
    second = school.leg(Role.PREFILL, 10, 20)
    assert (ahead(second), charged(second)) == (300, 30)
    assert (ahead(Leg(BOTH, second.instance)), charged(Leg(BOTH, second.instance))) == (0, 0)


def test_a_prefills_rate_is_its_time_over_its_work_and_what_was_ahead() -> None:
    school = School()
    leg = school.leg(Role.PREFILL, 100)
    for _ in range(3):
        school.lessons.prefilled(leg, JOB, {}, 300, 0.4, None)
    assert school.rate(Role.PREFILL) == pytest.approx(1e-3)


def test_prompt_tokens_that_were_there_are_no_work() -> None:
    school = School()
    leg = school.leg(Role.PREFILL, 100)
    usage = {"prompt_tokens": 100, "prompt_tokens_details": {"cached_tokens": 60}}
    for _ in range(3):
        school.lessons.prefilled(leg, JOB, {}, 0, 0.4, usage)
    assert school.rate(Role.PREFILL) == pytest.approx(1e-2)


@pytest.mark.parametrize("details", [None, [], {}, {"cached_tokens": "60"}, {"cached_tokens": 100}])
def test_senseless_words_of_what_was_there_are_ignored(details: Any) -> None:
    school = School()
    for _ in range(3):
        usage = {"prompt_tokens": 100, "prompt_tokens_details": details}
        school.lessons.prefilled(school.leg(Role.PREFILL, 100), JOB, {}, 0, 0.1, usage)
    assert school.rate(Role.PREFILL) == pytest.approx(1e-3)


def test_what_does_both_learns_how_fast_it_prefills() -> None:
    school = School()
    leg = school.leg(BOTH, 150)
    for _ in range(3):
        school.lessons.began(leg, JOB, 100, 0.2)
    assert school.rate(BOTH) == pytest.approx(1e-3)
    school.lessons.answered(leg, JOB, {}, 40, 1.0)
    assert school.observed(BOTH) == 3


def test_a_pace_is_learnt_as_the_reading_of_kv_from_one_answer_in_four() -> None:
    school = School()
    leg = school.leg(Role.DECODE, 5000)
    step = STEP + SEQUENCE + TOKEN * 5000
    for _ in range(12):
        school.lessons.answered(leg, JOB, {}, 40, 40 * 3 * step)
    assert school.observed(Role.DECODE) == 3
    assert school.rate(Role.DECODE) == pytest.approx(3 * TOKEN, rel=0.02)


def test_an_answer_of_few_tokens_tells_no_pace() -> None:
    school = School()
    school.lessons.answered(school.leg(Role.DECODE, 5000), JOB, {}, 3, 9.0)
    assert school.observed(Role.DECODE) == 0


def test_items_that_were_not_there_teach_the_rate_and_all_teach_who_holds_them() -> None:
    school = School()
    candidates = pool([HOST[Role.ENCODE]], Role.ENCODE)
    one, two = item("one"), item("two", 300, 1)
    leases = [school.balancer.take(Role.ENCODE, candidates, Demand(i.work, i.identity)) for i in (one, two)]
    leg = Leg(Role.ENCODE, leases[0].instance, (one, two), Held(leases, school.permit))
    for _ in range(3):
        school.lessons.encoded(leg, {0: handle(cached=False), 1: handle(cached=False)}, 0, 0.4)
    assert school.rate(Role.ENCODE) == pytest.approx(1e-3)
    school.lessons.encoded(leg, {0: handle(cached=True), 1: handle(cached=False)}, 0, 0.001)
    assert school.observed(Role.ENCODE) == 3
    school.lessons.lost([leg])
    assert not school.balancer.holders.holders("one")


def test_of_encoders_that_do_not_tell_only_those_teach_that_were_not_believed_to_hold_anything() -> None:
    school = School()
    school.lessons.encoded(school.leg(Role.ENCODE, hit(100), items=(item("one"),)), {}, 0, 0.001)
    assert school.observed(Role.ENCODE) == 0
    school.lessons.encoded(school.leg(Role.ENCODE, 100, items=(item("one"),)), {0: handle()}, 0, 0.1)
    assert school.observed(Role.ENCODE) == 1


def test_an_encoder_tells_the_size_of_what_only_it_has_seen() -> None:
    school = School()
    leg = school.leg(Role.ENCODE, 100, items=(item("http://x/y.png"),))
    school.lessons.encoded(leg, {0: handle()}, 0, 0.1)
    assert school.costs.sizes.find("http://x/y.png") == (1, 4, 8)


def test_counts_of_prompts_correct_the_text_without_what_items_took() -> None:
    school = School()
    job = replace(JOB, items=(item("one"), item("two", 30, 1)))
    leg = school.leg(Role.PREFILL, 230)
    for _ in range(400):
        school.lessons.prefilled(leg, job, {0: handle(num_tokens=70)}, 0, 0.1, {"prompt_tokens": 300})
    assert school.costs.text.tokens("m", 400) == pytest.approx(200, abs=4)


def test_nothing_is_counted_where_nothing_sensible_is_told() -> None:
    school = School()
    leg = school.leg(Role.DECODE, 100)
    for usage in (None, [], {}, {"prompt_tokens": True}, {"prompt_tokens": "9"}):
        for _ in range(4):
            school.lessons.answered(leg, JOB, {}, 0, 1.0, usage)
    assert school.costs.text.shown() == {}
    assert [generated(usage) for usage in (None, [], {}, {"completion_tokens": 7})] == [0, 0, 0, 7]


# ---- over real sockets


def observations(d: Deployment) -> dict[str, int]:
    """By role: of all instances."""
    rates, found = d.proxy.balancer.rates, dict[str, int]()
    for instance in d.proxy.fleet:
        label, count = instance.role.label, rates[instance.role].shown(instance.url)["observations"]
        found[label] = found.get(label, 0) + count
    return found


@pytest.mark.parametrize("handoff", ["push", "pull"])
async def test_each_leg_that_ends_well_is_observed_once(handoff: str) -> None:
    async with deployment("1e1p1d", handoff) as d:
        d.decodes[0].pieces = tuple(f"piece {n} " for n in range(40))
        assert (await d.post(chat(part(image()), stream=True))).status == 200
        assert observations(d) == {"encode": 1, "prefill": 1, "decode": 1}
        assert (await d.post(chat())).status == 200
        assert observations(d) == {"encode": 1, "prefill": 2, "decode": 1}, "one answer in four"


async def test_legs_that_fail_or_are_left_alone_teach_no_rate() -> None:
    async with deployment("1e1p1d") as d:
        for engine in d.engines:
            engine.fail(*[Fault(Kind.STATUS, status=500)] * 3)
            assert (await d.post(chat(part(image())))).status == 500
        assert observations(d)["decode"] == 0
        d.decodes[0].gate = asyncio.Event()
        before = observations(d)
        asking = asyncio.create_task(d.post(chat()))
        await d.decodes[0].until(lambda: d.decodes[0].running == 1)
        asking.cancel()
        await asyncio.wait([asking])
        await d.settle()
        assert observations(d) == before


async def test_a_combined_engine_is_observed_at_its_first_token_and_its_count_corrects_the_text() -> None:
    async with deployment("1b") as d:
        assert (await d.post(chat(stream=True))).status == 200
        assert observations(d) == {"both": 1}
        assert (await d.post(chat())).status == 200
        assert observations(d) == {"both": 1}, "when the first token came is not known"


async def test_a_promised_embedding_is_observed_when_it_is_there_and_no_prefill_is_blamed_for_it() -> None:
    async with deployment("1e1p1d", "pull") as d:
        (encoder,), (prefill,) = d.encoders, d.prefills
        for number in range(3):
            encoder.computing, prefill.gate = asyncio.Event(), asyncio.Event()
            asking = asyncio.create_task(d.post(chat(part(image(8 + number)))))
            await prefill.until(lambda: prefill.running == 1)
            seen = observations(d)
            assert (seen["encode"], seen["prefill"]) == (number, number)
            await asyncio.sleep(0.3)
            encoder.computing.set()
            await encoder.until(lambda: not encoder.running)
            prefill.gate.set()
            assert (await asking).status == 200
        rates = d.proxy.balancer.rates
        assert rates[Role.ENCODE].seconds(encoder.url) * MOST > 0.3
        assert rates[Role.PREFILL].seconds(prefill.url) * LEAST < 0.3
