from pathlib import Path
from typing import Any

import pytest

from bench import simulate
from bench.report import Report
from bench.simulator.plots import PICTURES

ROWS: dict[str, list[dict[str, Any]]] = {
    "seed000": [
        {"model": "Qwen9", "deployment": name, "gpus": 8, "published_e2e_ms": 10.0, "simulated_e2e_ms": 11.0}
        for name in ("apart", "together")
    ],
    "policies": [
        {"policy": policy, "images": images, "offered": offered, "mean_ms": 5.0, "p99_ms": 9.0, "hit_rate": 0.5}
        for policy in ("affinity", "random")
        for images in ("again", "new")
        for offered in (0.5, 1.0)
    ],
    "decider": [{"workload": "light", "always_ms": 5.0, "never_ms": 4.0, "decided_ms": 4.0}],
    "scale": [
        {"decision": what, "instances": number, "microseconds": 9.0}
        for what in ("take", "draw")
        for number in (10, 1000)
    ]
    + [{"requests": 1000, "seconds": 1.5}],
    "planner": [{"workload": "w", "advised": "2:3:3", "best": "2:2:4", "advised_rps": 3.0, "best_rps": 3.1}],
}
ROWS["seed001"] = ROWS["seed000"]


@pytest.mark.parametrize("scenario", PICTURES)
def test_every_scenario_s_rows_make_a_picture(scenario: str, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    PICTURES[scenario](Report(scenario, ROWS[scenario]), file)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_every_scenario_has_a_picture() -> None:
    assert PICTURES.keys() >= simulate.SCENARIOS.keys()
