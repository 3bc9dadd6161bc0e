import argparse
import json
from pathlib import Path

import pytest

from bench.report import Report, add_arguments, align


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(flags)


def report() -> Report:
    made = Report("speed")
    made.row(who="ours", rate=1234.5, note="x")
    made.row(who="theirs", rate=9.87654, ratio=None)
    made.bar("fast", 2.0, 1.0, ">=")
    return made


def test_the_table_shows_rows_and_bars(capsys: pytest.CaptureFixture[str]) -> None:
    assert report().emit(arguments()) == 0
    shown = capsys.readouterr().out
    assert "1,234.5" in shown
    assert "9.877" in shown
    assert "fast: 2 >= 1  holds" in shown


def test_the_json_has_the_contract_s_keys(capsys: pytest.CaptureFixture[str]) -> None:
    made = report()
    made.bar("small", 3.0, 1.0)
    assert made.emit(arguments("--json")) == 1, "a bar that does not hold is the exit status"
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == {"bench", "machine", "rows", "bars"}
    assert [bar["holds"] for bar in printed["bars"]] == [True, False]
    assert printed["bars"][1] == {"name": "small", "value": 3.0, "op": "<=", "limit": 1.0, "holds": False}


def test_numbers_stand_to_the_right_and_text_to_the_left() -> None:
    assert align([{"a": "x", "b": 1}, {"a": "yyy", "b": 100}]) == ["a      b", "x      1", "yyy  100"]


def test_a_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "speed.png"
    report().emit(arguments("--plot", str(file)))
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_benchmark_may_have_a_picture_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = []
    made = report()
    made.picture = lambda report, file: drawn.append((report, file))
    made.emit(arguments("--plot", str(tmp_path / "own.png")))
    assert drawn == [(made, tmp_path / "own.png")]
