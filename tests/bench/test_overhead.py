import json
from statistics import median

import pytest

from bench import overhead
from bench.overhead import FOUR, ONE, STREAM, TEXT, Figures
from bench.report import Report


def figures(factor: float, peak: float | None = None) -> Figures:
    found = Figures(first=[0.001 * factor] * 100, peak=peak)
    for name, base in ((TEXT, 100e-6), (STREAM, 100e-6 + 64 * 20e-6), (FOUR, 4e-3), (ONE, 5e-3)):
        found.cpu[name] = [base * factor * drift for drift in (1.0, 3.0, 2.0)]
    return found


def told(**results: Figures) -> Report:
    report = Report("overhead")
    named = {name.replace("_", "-"): found for name, found in results.items()}
    overhead.tell(report, {"direct": figures(1), **named})
    return report


def test_a_token_costs_what_streaming_adds() -> None:
    assert median(figures(1).tokens()) == pytest.approx(40e-6)


def test_ratios_are_taken_within_a_repeat() -> None:
    mine, theirs = figures(2), figures(1)
    theirs.cpu[TEXT][2] *= 100
    assert mine.by(theirs, TEXT) == pytest.approx(2.0)
    assert mine.by(None, TEXT) is None


def test_bars_against_absent_peers_are_left_out() -> None:
    report = told(triptych_push=figures(2, 500), triptych_pull=figures(3, 700))
    names = [bar.name for bar in report.bars]
    assert not any("nginx" in name or "router" in name for name in names)
    holds = {bar.name: bar.holds for bar in report.bars}
    assert holds["push: added time to first token, ms, median"]
    assert holds["push: MB resident at 64 requests of 4 MB"]
    assert not holds["pull: MB resident at 64 requests of 4 MB"]


def test_bars_against_peers() -> None:
    report = told(triptych_push=figures(1), triptych_pull=figures(2), nginx=figures(1), vllm_router=figures(4))
    values = {bar.name: (bar.value, bar.holds) for bar in report.bars}
    assert values["push: text, CPU by vllm-router's"] == (0.25, True)
    assert values["pull: token, CPU by nginx's"] == (2.0, False)
    assert values[f"push: {FOUR}, CPU by vllm-router's"] == (0.25, True)
    assert values[f"pull: {FOUR}, CPU by vllm-router's"] == (0.5, False)
    assert [row["candidate"] for row in report.rows].count("nginx") == 4


def test_the_images_limit_moves_with_the_machine() -> None:
    assert [overhead.images_limit(ms) for ms in (1.25, 2.5, 3.0, 4.0, 8.0)] == [3.5, 7.0, 7.0, 7.0, 14.0]


def test_workloads_are_of_the_sizes_promised() -> None:
    sizes = {workload.name: len(workload.body) for workload in overhead.workloads()}
    assert 1000 <= sizes[TEXT] <= 1100
    assert 4.19e6 < sizes[FOUR] < 4.21e6
    assert 5.59e6 < sizes[ONE] < 5.6e6


def test_a_small_run_prints_its_rows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "INTERVAL_S", 0.001)
    monkeypatch.setattr(overhead, "STREAM_S", 0.05)
    monkeypatch.setattr(overhead, "HELD_S", 0.1)
    status = overhead.main(["--json", "--repeats", "1", "--scale", "0.05", "--peers", "nginx"])
    printed = json.loads(capsys.readouterr().out)
    rows = [row for row in printed["rows"] if row["candidate"].startswith("triptych-")]
    assert len(rows) == 8
    assert [row["workload"] for row in printed["rows"] if row["candidate"] == "bare"] == [TEXT, STREAM]
    assert [row["by_bare"] is not None for row in rows] == [True, True, False, False] * 2
    assert all(row["cpu_us_per_request"] > 0 for row in rows)
    assert status == (0 if all(bar["holds"] for bar in printed["bars"]) else 1)


def test_an_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main(["--peers", "caddy"]) == 2
    assert "no peer 'caddy'" in capsys.readouterr().err
