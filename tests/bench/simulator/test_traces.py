import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from bench.simulator.requests import Text
from bench.simulator.traces import azure, mooncake
from bench.simulator.workloads import VGA, Gallery

AZURE = """TIMESTAMP,NumImages,ContextTokens,GeneratedTokens
2024-10-15 00:00:10.5000000,2,1500,80
2024-10-15 00:00:11.000000,0,0,160
2024-10-15 00:00:14.5,1,400,0
"""


def gallery() -> Gallery:
    return Gallery(np.random.default_rng(1), {VGA: 1.0})


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_an_azure_trace_is_read_plain_or_zipped(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    with gzip.open(file, "wt") if name.endswith(".gz") else file.open("w") as out:
        out.write(AZURE)
    (at0, first), (at1, second), (at2, third) = azure(file, gallery())
    assert (at0, at1, at2) == (0.0, 0.5, 4.0)
    assert (len(first.media), first.text_tokens, first.output_tokens) == (2, 1500, 80)
    assert (len(second.media), second.text_tokens, second.output_tokens) == (0, 1, 160)
    assert (len(third.media), third.text_tokens, third.output_tokens) == (1, 400, 1)
    assert len({image.identity for image in (*first.media, *third.media)}) == 3


def test_a_trace_can_be_played_faster(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(AZURE)
    assert [at for at, _ in azure(file, gallery(), speed=2.0)] == [0.0, 0.25, 2.0]


@pytest.mark.parametrize("row", ["2024-10-15 00:00:00,x,1,1", "yesterday,1,1,1", "2024-10-15 00:00:00,1"])
def test_a_row_that_is_none_of_azure_s_is_named(tmp_path: Path, row: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(f"{AZURE}{row}\n")
    with pytest.raises(ValueError, match=r"trace\.csv, line 5, is not of an Azure LMM trace"):
        list(azure(file, gallery()))


def written(file: Path, *rows: object) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def row(at: int, tokens: int, blocks: list[int]) -> dict[str, object]:
    return {"timestamp": at, "input_length": tokens, "output_length": 52, "hash_ids": blocks}


def test_a_mooncake_trace_has_a_part_for_each_block(tmp_path: Path) -> None:
    file = written(tmp_path / "t.jsonl", row(3000, 1100, [46, 47, 48]), row(6000, 512, [46]), row(6500, 7, []))
    (at0, first), (at1, second), (at2, third) = mooncake(file, speed=2.0)
    assert (at0, at1, at2) == (0.0, 1.5, 1.75)
    assert first.parts == (Text(512, "46"), Text(512, "47"), Text(76, "48"))
    assert second.parts == (Text(512, "46"),)
    assert third.parts == (Text(7),)
    assert first.output_tokens == 52


@pytest.mark.parametrize("bad", [{"timestamp": 1}, [1], {**row(1, 1, []), "input_length": None}])
def test_a_row_that_is_none_of_mooncake_s_is_named(tmp_path: Path, bad: object) -> None:
    file = written(tmp_path / "t.jsonl", row(0, 5, [1]), bad)
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2, is not of a Mooncake trace"):
        list(mooncake(file))
