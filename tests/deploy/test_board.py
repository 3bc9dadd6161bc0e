"""The board that is shipped: it is the one that the code builds."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

from deploy.board import board, now, quantile, rate, share

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_the_shipped_file_is_what_the_code_builds() -> None:
    shipped = json.loads((DEPLOY / "grafana" / "triptych.json").read_text())
    assert shipped == board(), "python -m deploy.board > deploy/grafana/triptych.json"


def test_no_two_panels_overlap_or_leave_the_board() -> None:
    def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
        at = panel["gridPos"]
        return {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}

    taken = [cells(panel) for panel in board()["panels"]]
    assert all(x < 24 for cell in taken for x, _ in cell)
    assert not any(one & other for one, other in combinations(taken, 2))


def test_queries_name_the_boards_own_part_of_a_metric() -> None:
    here = 'job=~"$job",instance=~"$proxy"'
    assert now("m") == f"m{{{here}}}"
    assert rate("m", 'a="b"') == f'rate(m{{{here},a="b"}}[$__rate_interval])'
    assert quantile(0.5, "m") == f"histogram_quantile(0.5, sum by (le) ({rate('m_bucket')}))"
    assert share("a", "b") == "(sum(a) or vector(0)) / sum(b)"
