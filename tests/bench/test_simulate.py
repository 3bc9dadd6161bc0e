import json

import pytest

from bench import simulate
from bench.simulator.scenarios import seed000


def test_a_scenario_prints_published_beside_simulated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seed000, "COLUMNS", seed000.COLUMNS[3:])
    with pytest.raises(SystemExit) as end:
        simulate.main(["--scenario", "seed000", "--runs", "30", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert end.value.code == 0
    assert printed["bench"] == "simulate seed000"
    (row,) = printed["rows"]
    assert row["published_e2e_ms"] == 610
    assert abs(row["error_percent"]) < 10
    (bar,) = printed["bars"]
    assert bar["holds"]
    assert bar["limit"] == seed000.WITHIN


def test_an_unknown_scenario_is_refused() -> None:
    with pytest.raises(SystemExit) as end:
        simulate.main(["--scenario", "seed999"])
    assert end.value.code == 2
