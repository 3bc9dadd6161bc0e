"""Every row and bar of a GPU, of a shape so small that a CPU does it. The figures mean nothing here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from bench import device, engines
from bench.report import Report
from bench.shapes import Peak
from bench.stepping import Ours
from engines.errors import SetupError
from engines.language.model import ModelFacts
from tests.support.checkpoints import checkpoint


def tiny(family: str) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.from_pretrained(checkpoint(family))
    return config


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, Any] = {
        "PICTURE": (128, 64),
        "BATCH_PATCHES": 64,
        "PROMPTS": (24, 32),
        "PROMISED_PROMPT": 32,
        "BATCHES": (1, 2),
    }
    small |= {
        "CONTEXT": 16,
        "STEPS": 2,
        "KV_TOKENS": 8192,
        "DECODING": 2,
        "TOKENS": 40,
        "OTHERS": 48,
        "CHUNK": 16,
        "PROMISED": "tiny",
    }
    for name, value in small.items():
        monkeypatch.setattr(device, name, value)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_every_stage_is_measured_beside_transformers_and_the_best_there_is(family: str) -> None:
    report = Report("engines")
    subject = device.Subject("tiny", tiny(family), torch.device("cpu"), torch.float32, Peak(1e15, 1e15))
    device.measure(report, subject, repeats=1)
    works = ["encode 1080p", "prefill 24 tokens", "prefill 32 tokens", "decode batch 1", "decode batch 2"]
    assert [row["work"] for row in report.rows] == [*works, "2 decode beside prompts of 48"]
    for row in report.rows[:-1]:
        assert row["triptych"] > 0
        assert row["transformers"] > 0
        assert 0 <= row["share_of_best"] < 1
    assert [(bar.op, bar.limit) for bar in report.bars] == [
        (">=", 0.45),
        (">=", 0.5),
        (">=", 0.7),
        (">=", 0.7),
        ("<=", 1.5),
    ]


@pytest.mark.parametrize(("stages", "works"), [(["encode"], ["encode 1080p"]), (["waiting"], ["2 decode beside"])])
def test_stages_are_measured_by_themselves_and_told_as_they_end(
    stages: list[str], works: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report("engines")
    subject = device.Subject("tiny", tiny("qwen3_vl"), torch.device("cpu"), torch.float32, Peak(1e15, 1e15))
    device.measure(report, subject, repeats=1, stages=stages)
    assert [row["work"][: len(work)] for row, work in zip(report.rows, works, strict=True)] == works
    told = capsys.readouterr().err
    assert ("of the best" in told) == ("encode" in stages)
    assert ("from token to token" in told) == ("waiting" in stages)


def test_both_sides_have_the_same_weights_and_say_the_same() -> None:
    config = tiny("qwen3_vl")
    subject = device.Subject("tiny", config, torch.device("cpu"), torch.float32, Peak(1e15, 1e15))
    facts = ModelFacts.read(checkpoint("qwen3_vl"))
    model = device.language_model(subject, facts)
    prompt = device.text(20, config)
    ours = Ours(device.runner_over(model))
    (sequence,) = ours.sequences(1, prompt, room=1)
    ours.step([sequence])
    theirs = device.theirs_over(model, subject)
    with torch.inference_mode():
        said = model.lm_head(theirs(torch.tensor([prompt])).last_hidden_state[:, -1]).argmax(-1)
    assert sequence.output_ids == said.tolist()
    assert theirs.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def asked(**flags: Any) -> argparse.Namespace:
    fields = {"device": "cpu", "shapes": "Qwen3-VL-8B,Qwen2.5-VL-3B", "peak_tflops": 100.0, "peak_gbytes": 2000.0}
    fields |= {"stages": "encode,decode"}
    return argparse.Namespace(**{**fields, **flags})


def test_shapes_are_chosen_and_peaks_told_on_the_command_line() -> None:
    subjects = engines.subjects_of(asked())
    assert [subject.name for subject in subjects] == ["Qwen3-VL-8B", "Qwen2.5-VL-3B"]
    assert {subject.peak for subject in subjects} == {Peak(1e14, 2e12)}
    assert [subject.dtype for subject in subjects] == [torch.bfloat16] * 2
    assert [subject.config.text_config.hidden_size for subject in subjects] == [4096, 2048]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"shapes": "Qwen9"}, "known are Qwen2.5-VL-3B"),
        ({"stages": "decode,sleep"}, "--stages sleep: known are encode"),
        ({"peak_tflops": None}, "what cpu can do is not known"),
        ({"device": "abacus"}, "--device abacus"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is(flags: dict[str, Any], told: str) -> None:
    with pytest.raises((LookupError, SetupError), match=told):
        engines.subjects_of(asked(**flags))


def test_every_subject_goes_into_one_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(report: Report, subject: device.Subject, repeats: int, stages: Sequence[str]) -> None:
        report.row(work=subject.name, n=repeats, stages=stages)

    monkeypatch.setattr(device, "measure", measure)
    report = engines.on_gpu(engines.subjects_of(asked()), 7, ["decode"])
    assert [row["work"] for row in report.rows] == ["Qwen3-VL-8B", "Qwen2.5-VL-3B"]
    assert all((row["n"], row["stages"]) == (7, ["decode"]) for row in report.rows)
