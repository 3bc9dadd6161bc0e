import json
from collections import Counter

import pytest

from bench import chaos
from bench.chaos import State, Tally
from bench.report import Report
from bench.scripted.verdict import Verdict

BEFORE = State(0, 40, 20, 100.0)


def told(after: State, **verdicts: int) -> dict[str, bool]:
    report = Report("chaos")
    tally = Tally(Counter({Verdict(name): number for name, number in verdicts.items()}), lies=["q1"])
    chaos.tell(report, "push", tally, BEFORE, after)
    assert report.rows[0]["requests"] == sum(verdicts.values())
    return {bar.name.removeprefix("push: "): bar.holds for bar in report.bars}


def test_every_leak_and_every_lie_has_its_bar() -> None:
    assert all(told(BEFORE, served=9, error=5, left=1).values())
    broken = told(State(1, 41, 21, 133.0), served=0, lie=1, hung=1)
    assert not any(broken.values())


def test_left_clients_do_not_count_as_unserved() -> None:
    report = Report("chaos")
    chaos.tell(report, "push", Tally(Counter({Verdict.SERVED: 3, Verdict.LEFT: 7, Verdict.ERROR: 1})), BEFORE, BEFORE)
    assert report.rows[0]["served_share"] == 0.75


def test_a_short_soak_kills_engines_and_tells_no_lie(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos, "SETTLE_S", (1, 3))
    monkeypatch.setattr(chaos, "KILL_EVERY_S", (0.2, 0.5))
    monkeypatch.setattr(chaos, "CLIENTS", 4)
    chaos.main(["--json", "--minutes", "0.05", "--handoff", "pull"])
    printed = json.loads(capsys.readouterr().out)
    holds = {bar["name"].removeprefix("pull: "): bar["holds"] for bar in printed["bars"]}
    assert printed["rows"][0]["kills"] > 0
    assert holds["lies"]
    assert holds["requests served"]
    assert holds["leases held at the end"]


def test_what_fails_without_a_kill_has_its_bar() -> None:
    report = Report("chaos")
    quiet = Tally(Counter({Verdict.SERVED: 3, Verdict.LEFT: 7, Verdict.ERROR: 1, Verdict.LIE: 1}), changes=4)
    chaos.tell(report, "push", Tally(Counter({Verdict.SERVED: 3})), BEFORE, BEFORE, quiet)
    bars = {bar.name.removeprefix("push: "): (bar.value, bar.holds) for bar in report.bars}
    assert bars["requests failed by changes alone"] == (2, False)
    assert bars["changes alone"] == (4, True)


def test_a_short_soak_of_discovered_engines_fails_nothing_but_by_kills(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos, "SETTLE_S", (1, 3))
    monkeypatch.setattr(chaos, "KILL_EVERY_S", (0.2, 0.5))
    monkeypatch.setattr(chaos, "CLIENTS", 4)
    monkeypatch.setattr(chaos, "WARM_UP", (0.4, 60.0))
    chaos.main(["--json", "--minutes", "0.1", "--handoff", "pull", "--discovery"])
    printed = json.loads(capsys.readouterr().out)
    holds = {bar["name"].removeprefix("pull: "): bar["holds"] for bar in printed["bars"]}
    assert holds["lies"] and holds["requests served"] and holds["leases held at the end"]
    assert holds["requests failed by changes alone"] and holds["changes alone"]
