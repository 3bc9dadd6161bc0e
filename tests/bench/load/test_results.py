"""What a run comes to."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from bench.load.asking import Outcome
from bench.load.results import Targets, block, draw, failures, quantile, routes, rows, summary

SERVED = [
    Outcome("text", 0.0, 0.1, 1.1, [0.5, 0.5], output_tokens=3, route="P-D; x"),
    Outcome("image", 1.0, 0.3, 0.7, [0.4], output_tokens=2, route="E-P-D; y"),
]
LOST = Outcome("text", 2.0, 0.2, 0.3, error="429 full")


def test_each_kind_has_its_row_and_failures_count_nowhere_else() -> None:
    everything, image, text = rows([*SERVED, LOST], 10.0, Targets())
    assert (everything["kind"], everything["requests"], everything["failed"]) == ("all", 3, 1)
    assert (everything["req/s"], everything["tok/s"]) == (0.2, 0.5)
    assert (image["ttft p50"], image["tpot p50"], image["e2e p99"]) == (300, 400, 700)
    assert (text["ttft p99"], text["tpot p50"], text["itl p99"]) == (100, 500, 500)
    assert "good/s" not in text


def test_one_kind_has_one_row_and_nothing_measured_is_nothing() -> None:
    (row,) = rows([LOST], 1.0, Targets())
    assert (row["kind"], row["ttft p50"], row["e2e p50"]) == ("text", None, None)


def test_good_requests_keep_both_targets() -> None:
    assert [row["good/s"] for row in rows([*SERVED, LOST], 1.0, Targets(first=0.2))] == [1.0, 0.0, 1.0]
    assert rows(SERVED, 1.0, Targets(pace=0.45))[0]["good/s"] == 1.0
    assert rows([LOST], 1.0, Targets(first=9.0))[0]["good/s"] == 0.0


def test_a_block_is_of_served_requests_and_first_tokens_of_those_that_had_one() -> None:
    silent = Outcome("text", 0.0, None, 2.0, prompt_tokens=7)
    found = block([*SERVED, LOST, silent], 10.0)
    assert (found["completed"], found["failed"], found["input_tokens"], found["output_tokens"]) == (3, 1, 7, 5)
    assert (found["req/s"], found["in_tok/s"], found["out_tok/s"], found["concurrency"]) == (0.3, 0.7, 0.5, 0.38)
    assert (found["ttft mean"], found["ttft median"], found["ttft p99"]) == (200, 200, 300)
    assert (found["tpot mean"], found["itl median"], found["e2e p99"]) == (450, 500, 2000)
    assert block([LOST], 1.0)["ttft p99"] is None


def test_a_quantile_is_a_value_that_was_seen() -> None:
    assert [quantile([1.0, 2.0, 3.0, 4.0], percent) for percent in (1, 25, 50, 51, 99, 100)] == [1, 1, 2, 3, 4, 4]


def test_failures_paths_and_progress_are_told() -> None:
    assert failures([*SERVED, LOST, LOST]) == [("429 full", 2)]
    assert routes([*SERVED, LOST]) == {"P-D": 1, "E-P-D": 1}
    assert summary([*SERVED, LOST]) == "3 done, 1 failed, first token 200 ms"


def test_a_picture_is_drawn_of_anything(tmp_path: Path) -> None:
    for number, outcomes in enumerate(([*SERVED, LOST], [LOST])):
        draw(outcomes, tmp_path / f"{number}.png")
        with Image.open(tmp_path / f"{number}.png") as picture:
            assert picture.size == (1680, 480)
