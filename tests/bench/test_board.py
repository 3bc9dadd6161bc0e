"""The picture of the board: what is asked of a Prometheus, and that whatever it answers can be drawn."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image

from bench.board import SHIPPED, asking, draw, main, series, top, written

BOARD = json.loads(SHIPPED.read_text())
LABELS = {"role": "encode", "exported_instance": "e:1", "state": "READY", "status": "200"}


def answer(query: str) -> list[dict[str, Any]]:
    """Some data for any panel: two states, or the buckets of a histogram."""
    if query.startswith("sum by (le) (increase("):
        return [
            {"metric": {"le": le}, "values": [[60, n], [75, 2 * n]]} for n, le in enumerate(("0.1", "1", "+Inf"), 1)
        ]
    return [{"metric": LABELS, "values": [[60, "1"], [75, "0"], [90, "1"]]}]


def test_a_legend_is_filled_with_labels() -> None:
    target = {"expr": "m", "legendFormat": "{{role}} {{exported_instance}} {{none}}"}
    (one,) = series({"targets": [target]}, answer)
    assert (one.name, list(one.times), list(one.values)) == ("encode e:1 ", [60, 75, 90], [1.0, 0.0, 1.0])


@pytest.mark.parametrize(
    "ask",
    [answer, lambda query: [], lambda query: [{"metric": LABELS, "values": [[60, "NaN"]]}]],
    ids=["some", "none", "nan"],
)
def test_the_shipped_board_can_be_drawn_with_whatever_there_is(ask: Any, tmp_path: Path) -> None:
    file = tmp_path / "board.png"
    draw(top(BOARD, 4), ask, (60, 90), file)
    with Image.open(file) as picture:
        assert picture.width > 1000 < picture.height


def test_a_board_is_cut_between_rows() -> None:
    titles = [panel["title"] for panel in top(BOARD, 2)["panels"] if panel["type"] == "row"]
    assert titles == ["Overview", "Stages"]
    assert top(BOARD, 99) == BOARD


def test_prometheus_is_asked_with_the_boards_variables_replaced() -> None:
    asked: list[dict[str, list[str]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(parse_qs(urlsplit(self.path).query))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"status":"success","data":{"result":[]}}')

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            ask = asking(f"http://127.0.0.1:{server.server_port}", (1000, 1600), "20s")
            assert ask('rate(m{job=~"$job",instance=~"$proxy"}[$__rate_interval])') == []
        finally:
            server.shutdown()
            thread.join()
    (one,) = asked
    assert one["query"] == ['rate(m{job=~".*",instance=~".*"}[20s])']
    assert (one["start"], one["end"], one["step"]) == (["1000"], ["1600"], ["2.0"])


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, "s", "12.3 ms"),
        (0.00002, "s", "20 µs"),
        (12.0, "s", "12 s"),
        (0.015, "percentunit", "1.5 %"),
        (2_500_000, "Bps", "2.5 MB/s"),
        (131.0, "reqps", "131 /s"),
        (1500, "short", "1.5 k"),
        (float("inf"), "s", "∞"),
    ],
)
def test_values_are_written_with_their_unit(value: float, unit: str, text: str) -> None:
    assert written(value, unit) == text


def test_no_prometheus_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--prometheus", "http://127.0.0.1:9", "--plot", str(tmp_path / "x.png")]) == 1
    assert capsys.readouterr().err.startswith("board: http://127.0.0.1:9: ")
