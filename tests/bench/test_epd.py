"""Stages apart beside all in one: real engines once; what is told of them without."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import epd
from bench.epd import Answers, Plan, Seen
from bench.load.asking import Outcome
from bench.load.questions import Mixture, Question
from bench.report import Report
from tests.support.checkpoints import checkpoint

IMAGE = Outcome("image", 0.0, 0.4, 1.0, [0.2] * 3, output_tokens=4)
TEXT = Outcome("text", 0.0, 0.1, 0.5, [0.1] * 3, output_tokens=4)


def arguments(**given: object) -> argparse.Namespace:
    flags = {"topologies": "2epd,1e1pd", "images": "1,8", "image_share": 0.5, "requests": 4, "repeats": 1, "rate": 2.0}
    return argparse.Namespace(**{**flags, **given})


def test_only_as_many_engines_are_compared() -> None:
    plan = epd.plan_of(arguments())
    assert (plan.topologies, plan.images) == (("2epd", "1e1pd"), (1, 8))
    with pytest.raises(ValueError, match="1e1p1d has 3"):
        epd.plan_of(arguments(topologies="2epd,1e1p1d"))
    with pytest.raises(argparse.ArgumentTypeError, match="no topology"):
        epd.plan_of(arguments(topologies="2e"))


def test_answers_are_compared_over_topologies_where_they_were_served() -> None:
    answers, question = Answers(), Question("text", b"a")
    for digest, error in ((1, ""), (2, "503"), (1, ""), (3, "")):
        answers.compare(question, Outcome("text", 0.0, digest=digest, error=error))
    answers.compare(Question("text", b"b"), Outcome("text", 0.0, digest=3))
    assert answers.differing == 1


def test_each_kind_has_a_row_and_failures_and_differences_break_bars() -> None:
    lost = Outcome("text", 0.0, error="503")
    found = {("2epd", 4): Seen([IMAGE, TEXT], 2.0), ("1e1pd", 4): Seen([IMAGE, TEXT, lost], 2.0)}
    report = Report("epd")
    epd.tell(report, found, Answers(differing=2))
    assert [(row["topology"], row["images"], row["beside"]) for row in report.rows] == [
        ("2epd", 4, 4),
        ("2epd", 0, 4),
        ("1e1pd", 4, 4),
        ("1e1pd", 0, 4),
    ]
    assert [row["ttft mean"] for row in report.rows] == [400, 100, 400, 100]
    assert report.bars[-1].name == "text beside 4 images: time per token, 1e1pd / 2epd"
    assert (report.bars[-1].value, report.bars[-1].holds) == (1.0, True)
    assert {bar.name: bar.value for bar in report.bars if not bar.holds} == {
        "requests not served": 1,
        "answers that differ": 2,
    }


def test_all_threads_of_a_process_keep_to_one_core() -> None:
    core = min(os.sched_getaffinity(0))
    code = "import threading; threading.Thread(target=input).start(); print(1, flush=True)"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin and child.stdout
    child.stdout.readline()
    epd.pin(child.pid, core)
    threads = [int(thread.name) for thread in Path(f"/proc/{child.pid}/task").iterdir()]
    assert len(threads) == 2
    assert all(os.sched_getaffinity(thread) == {core} for thread in threads)
    child.communicate(b"\n", timeout=10)


async def test_real_engines_answer_alike() -> None:
    mixture = Mixture(epd.MODEL, words=5, tokens=4, share=0.5, sizes=((64, 48),))
    report = Report("epd")
    await epd.measure(report, checkpoint("qwen3_vl"), Plan(("1e1pd", "2epd"), (2,), 4, 1, 20.0, mixture))
    assert [bar for bar in report.bars[:2] if not bar.holds] == []  # so few requests say nothing of a pace
    assert {row["topology"] for row in report.rows} == {"1e1pd", "2epd"}
    assert sum(row["completed"] for row in report.rows) == 8
