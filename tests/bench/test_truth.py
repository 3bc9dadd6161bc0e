import json

import pytest

from bench import truth
from bench.report import Report
from bench.scripted.faults import Fault
from bench.scripted.verdict import Verdict
from bench.truth import Cancelled, Case, Outcome, is_right

DECODE_CUT = Case("triptych-push", "decode", Fault.CUT)


def test_what_could_be_served_must_be_served() -> None:
    for fault in Fault:
        case = Case("triptych-push", "prefill", fault)
        assert is_right(case, True, Verdict.SERVED, 200)
        assert not is_right(case, True, Verdict.LIE, 200)
        assert is_right(case, True, Verdict.ERROR, 400) == (fault is Fault.CLIENT_ERROR)


def test_only_a_stream_that_has_begun_may_end_in_an_error() -> None:
    assert is_right(DECODE_CUT, True, Verdict.ERROR, 200)
    assert not is_right(DECODE_CUT, False, Verdict.ERROR, 502)
    assert not is_right(DECODE_CUT, True, Verdict.ABORT, 200)
    assert not is_right(Case("triptych-push", "decode", Fault.RESET), True, Verdict.ERROR, 502)


def test_bars_are_for_our_own_proxy(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("truth")
    peer = Case("vllm-router", "decode", Fault.CUT)
    outcomes = [Outcome(case, True, Verdict.LIE, 200, False, 2) for case in (DECODE_CUT, peer)]
    truth.tell(report, outcomes, [Cancelled("triptych-push", "decode, streamed", 4, 3, 0.05)])
    assert {bar.name: bar.holds for bar in report.bars} == {
        "triptych-push: share answered as well as could be": False,
        "triptych-push: abort": True,
        "triptych-push: lie": False,
        "triptych-push: hung": True,
        "triptych-push: share of clients' leaving seen by engines": False,
    }
    assert [(row["proxy"], row["fault"], row["lie"]) for row in report.rows] == [
        ("triptych-push", "cut", 1),
        ("vllm-router", "cut", 1),
        ("triptych-push", "all", 1),
        ("vllm-router", "all", 1),
    ]
    assert "decode, streamed (3 of 4)" in capsys.readouterr().err


def test_a_small_run_judges_every_answer(capsys: pytest.CaptureFixture[str]) -> None:
    truth.main(["--json", "--peers", "", "--faults", "400", "--handoffs", "pull"])
    printed = json.loads(capsys.readouterr().out)
    total = printed["rows"][-1]
    assert total["requests"] == 3 * 2 * truth.REQUESTS
    assert total["served"] + total["error"] == total["right"] == total["requests"]
    assert next(bar for bar in printed["bars"] if "400" in bar["name"])["holds"]


def test_an_unknown_fault_is_refused() -> None:
    with pytest.raises(SystemExit):
        truth.main(["--faults", "earthquake", "--peers", ""])


def test_a_400_must_reach_its_client_once_per_call(capsys: pytest.CaptureFixture[str]) -> None:
    case = Case("triptych-push", "decode", Fault.CLIENT_ERROR)
    for met, holds in ((1, True), (2, False)):  # two calls for one answer: the mistake was tried again
        report = Report("truth")
        truth.tell(report, [Outcome(case, True, Verdict.ERROR, 400, True, met)], [])
        assert next(bar.holds for bar in report.bars if "400" in bar.name) is holds
