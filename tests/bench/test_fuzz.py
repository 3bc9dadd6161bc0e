import json
from random import Random

import pytest
from hypothesis import strategies as st

from bench import fuzz
from bench.fuzz import Outcome
from bench.fuzzing.targets import Target
from bench.report import Report


def target(bad: bytes = b"never") -> Target:
    def run(data: bytes, dice: Random) -> bool:
        if bad in data:
            raise KeyError("planted")
        return bool(data)

    return Target("planted", st.binary, run, 1)


def test_as_many_inputs_as_were_asked_for() -> None:
    outcome = fuzz.run(target(), 500, 1)
    assert 500 <= outcome.inputs <= 600 and not outcome.finding
    assert 0 < outcome.taken < outcome.inputs and outcome.seconds > 0


def test_a_finding_is_told_with_its_input() -> None:
    outcome = fuzz.run(target(b"\xff"), 5000, 1)
    assert "KeyError: 'planted'" in outcome.finding and "bytes: b'" in outcome.finding and r"\xff" in outcome.finding


def test_bars() -> None:
    report = Report("fuzz")
    fuzz.tell(report, {"a": Outcome(60, 30, 1.0, 3.0), "b": Outcome(50, 1, 1.0, 0.0, "boom")}, 100)
    assert [(bar.value, bar.holds) for bar in report.bars] == [(110, True), (1, False), (3.0, True)]
    assert report.rows[0]["inputs_per_s"] == 60 and report.rows[1]["findings"] == 1


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--inputs", "400", "--targets", "media URL,events", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["target"] for row in told["rows"]] == ["media URL", "events"]
    assert sum(row["inputs"] for row in told["rows"]) >= 400
    with pytest.raises(SystemExit):
        fuzz.main(["--targets", "nothing"])
