"""A soak of real engines, for some seconds; what is told of it, without."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from bench import soak
from bench.report import Report
from bench.scripted.verdict import Verdict
from bench.soak import Tally
from tests.support.checkpoints import checkpoint
from tests.support.reference import reference

SERVED = Counter({Verdict.SERVED: 9, Verdict.ERROR: 3, Verdict.LEFT: 4})


def told(calm: Tally, tally: Tally, held: dict[str, int], mb: float) -> Report:
    report = Report("soak")
    soak.tell(report, "1e1pd", calm, tally, ({}, 100.0), (held, mb))
    return report


def test_every_lie_leak_and_loss_has_its_bar() -> None:
    well = told(Tally(Counter({Verdict.SERVED: 2, Verdict.LEFT: 1})), Tally(SERVED, audits=5), {}, 148.0)
    assert all(bar.holds for bar in well.bars)
    assert well.rows[0]["served_share"] == 0.75
    bad = Tally(Counter({Verdict.LIE: 1, Verdict.HUNG: 1}), lies=["a"], unbalanced=["b"])
    assert not any(bar.holds for bar in told(bad, bad, {"decode-0": 1}, 149.0).bars)


def test_the_catalogue_has_texts_and_images_with_answers_of_one_model() -> None:
    cases = soak.catalogue(reference("qwen3_vl"), random.Random(3))
    assert all(case.text for case in cases)
    assert {isinstance(case.content, str) for case in cases} == {True, False}
    assert json.loads(cases[0].body(stream=True))["stream"]


def test_a_short_soak_loses_no_block(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async def made(family: str, _folder: Path) -> Path:
        return checkpoint(family)

    monkeypatch.setattr(soak, "tiny_checkpoint", made)
    monkeypatch.setattr(soak, "KILLED", 0.0)  # a restart takes longer than this
    monkeypatch.setattr(soak, "STRIKE_EVERY_S", (0.5, 1.0))
    monkeypatch.setattr(soak, "FROZEN_S", (0.1, 0.5))
    monkeypatch.setattr(soak, "AUDIT_EVERY_S", 0.2)
    soak.main(["--json", "--minutes", "0.1", "--topology", "1e1pd"])
    printed = json.loads(capsys.readouterr().out)
    holds = {bar["name"]: bar["holds"] for bar in printed["bars"]}
    assert printed["rows"][0]["freezes"] > 0
    assert holds.pop("engines' MB resident at the end") is not None  # so short a time says nothing of it
    assert all(holds.values()), printed
