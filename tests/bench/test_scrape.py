import aiohttp
import pytest

from bench import scrape
from bench.report import Report
from bench.scrape import ALL, OFF, ON, PAGE, SCRAPE, SOME
from bench.scripted.candidates import Fleet

FLEET = Fleet(("http://e:1",), ("http://p:1",), ("http://d:1",))


def told(on: float) -> Report:
    report = Report("scrape")
    drift = (1.0, 3.0, 2.0)
    figures = {OFF: 400e-6, ON: on, SOME: 500e-6, ALL: 800e-6, SCRAPE: 9e-3, PAGE: 13e-3}
    scrape.tell(report, {what: [seconds * factor for factor in drift] for what, seconds in figures.items()})
    return report


@pytest.mark.parametrize(("on", "holds"), [(400e-6, True), (419e-6, True), (421e-6, False)])
def test_metrics_cost_a_twentieth_at_the_most(on: float, holds: bool) -> None:
    (bar,) = told(on).bars
    assert (bar.value, bar.holds) == (pytest.approx(on / 400e-6, abs=1e-4), holds)


def test_what_nobody_asks_for_in_a_request_is_told_in_requests() -> None:
    rows = {row["what"]: row for row in told(450e-6).rows}
    assert rows[ALL]["by_metrics_off"] == pytest.approx(2.0) and rows[ALL]["as_text_requests"] is None
    assert rows[SCRAPE]["as_text_requests"] == pytest.approx(20.0) and rows[SCRAPE]["by_metrics_off"] is None
    assert rows[PAGE]["cpu_us"] == pytest.approx(26_000)


def test_the_large_fleet_has_its_engines_once_each() -> None:
    fleet = scrape.large(FLEET)
    urls = [*fleet.encode, *fleet.prefill, *fleet.decode]
    assert len(set(urls)) == len(urls) == scrape.INSTANCES
    assert fleet.prefill[0] == "http://p:1" and fleet.decode[0] == "http://d:1"


def test_settings_differ_in_what_is_measured() -> None:
    assert [scrape.flags(name, "http://c:1") for name in (OFF, ON, ALL)] == [
        ("--metrics", "off"),
        (),
        ("--otlp-endpoint", "http://c:1", "--trace-sample", "1"),
    ]


async def test_the_collector_takes_what_it_is_sent() -> None:
    async with scrape.collecting() as url, aiohttp.ClientSession() as http:
        for _ in range(2):
            async with http.post(f"{url}/v1/traces", data=b"x" * 100_000) as answer:
                assert answer.status == 200
