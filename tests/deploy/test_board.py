"""The board that is shipped: it is the one that the code builds, and asks for nothing that a proxy does not tell."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

from deploy.board import board, now, quantile, rate, share
from tests.fakes import native
from tests.support.crowd import crowd

DEPLOY = Path(__file__).parents[2] / "deploy"
ASKING = [
    DEPLOY / "grafana" / "triptych.json",
    DEPLOY / "prometheus" / "rules.yml",
    DEPLOY / "prometheus" / "alerts.yml",
]


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


async def test_board_and_rules_ask_only_for_what_a_proxy_tells(tmp_path: Path) -> None:
    async with (
        native.Language() as engine,
        crowd(tmp_path, 1, "--decode-servers-urls", engine.url) as proxy,
        proxy.http.get(f"{proxy.url}/metrics") as answer,
    ):
        told = await answer.text()
    kinds = dict(line.split()[2:4] for line in told.splitlines() if line.startswith("# TYPE"))
    series = {
        name + suffix
        for name, kind in kinds.items()
        for suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))
    }
    for file in ASKING:
        asked = set(re.findall(r"(?<![\w:])triptych_\w+", file.read_text()))
        assert asked
        assert asked <= series, f"{file.name} asks for {sorted(asked - series)}"


def test_the_operators_page_tells_of_every_alert_and_of_no_other() -> None:
    defined = set(re.findall(r"alert: (\w+)", (DEPLOY / "prometheus" / "alerts.yml").read_text()))
    page = (DEPLOY / "OPERATING.md").read_text()
    assert set(re.findall(r"`(Triptych[A-Z]\w+)`", page)) == defined
    assert set(re.findall(r"^\| `(Triptych\w+)` \|", page, re.MULTILINE)) == defined, "each with what to do"


def test_queries_name_the_boards_own_part_of_a_metric() -> None:
    here = 'job=~"$job",instance=~"$proxy"'
    assert now("m") == f"m{{{here}}}"
    assert rate("m", 'a="b"') == f'rate(m{{{here},a="b"}}[$__rate_interval])'
    assert quantile(0.5, "m") == f"histogram_quantile(0.5, sum by (le) ({rate('m_bucket')}))"
    assert share("a", "b") == "(sum(a) or vector(0)) / sum(b)"
