import pytest

from bench import engines
from tests.support.checkpoints import checkpoint


def test_every_stage_is_measured_beside_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "PROMPTS", (32,))
    monkeypatch.setattr(engines, "STEPS", 2)
    monkeypatch.setattr(engines, "PICTURES", ((64, 64), (96, 64)))
    report = engines.measure(checkpoint("qwen3_vl"), repeats=1)
    work = [row["work"] for row in report.rows]
    assert work == [
        "prefill 32 tokens",
        *(f"decode batch {batch}" for batch in (1, 8, 32)),
        "cut a 1080p image",
        "encode 2 images",
    ]
    assert all(row["triptych"] > 0 and row["transformers"] > 0 for row in report.rows)
    assert [bar.op for bar in report.bars] == [">="] * 4
