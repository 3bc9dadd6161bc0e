"""How panels become Grafana's JSON."""

from __future__ import annotations

from typing import Any

from deploy.panels import Panel, Row, panels


def places(found: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    return [tuple(panel["gridPos"][key] for key in "xywh") for panel in found]


def test_panels_are_laid_out_in_lines_under_the_title_of_their_row() -> None:
    wide, tall = Panel("wide", [("", "up")], width=20), Panel("tall", [("", "up")], width=4, height=9)
    found = list(panels([Row("one", [wide, tall, wide]), Row("two", [tall])]))
    assert [panel["title"] for panel in found] == ["one", "wide", "tall", "wide", "two", "tall"]
    assert places(found) == [(0, 0, 24, 1), (0, 1, 20, 7), (20, 1, 4, 9), (0, 10, 20, 7), (0, 17, 24, 1), (0, 18, 4, 9)]
    assert [panel["id"] for panel in found] == [1, 2, 3, 4, 5, 6]


def test_every_query_has_a_letter_and_a_legend() -> None:
    _, panel = panels([Row("", [Panel("two", [("a", "up"), ("b", "down")])])])
    told = [(target["refId"], target["legendFormat"], target["expr"]) for target in panel["targets"]]
    assert told == [("A", "a", "up"), ("B", "b", "down")]


def test_limits_are_colours_and_words_stand_for_values() -> None:
    _, panel = panels([Row("", [Panel("state", [], limits=(1, 2), words=[("closed", "green"), ("open", "red")])])])
    defaults = panel["fieldConfig"]["defaults"]
    assert [step["value"] for step in defaults["thresholds"]["steps"]] == [None, 1, 2]
    told = {"0": {"text": "closed", "color": "green"}, "1": {"text": "open", "color": "red"}}
    assert defaults["mappings"] == [{"type": "value", "options": told}]
