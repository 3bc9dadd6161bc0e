import pytest

from bench import engines
from tests.support.checkpoints import checkpoint


def test_every_stage_is_measured_beside_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "PROMPTS", (32,))
    monkeypatch.setattr(engines, "STEPS", 2)
    monkeypatch.setattr(engines, "PICTURES", ((64, 64), (96, 64)))
    report = engines.measure(checkpoint("qwen3_vl"), repeats=1)
    work = [row["work"] for row in report.rows]
    assert work == ["prefill 32 tokens", *(f"decode batch {batch}" for batch in (1, 8, 32)), "encode 2 images"]
    assert all(row["triptych"] > 0 and row["transformers"] > 0 for row in report.rows)
    assert [bar.op for bar in report.bars] == [">="] * 3


def test_turns_are_taken_and_the_first_is_not_counted() -> None:
    order: list[str] = []

    def work(name: str, seconds: list[float]) -> engines.Work:
        def once() -> float:
            order.append(name)
            return seconds.pop(0)

        return once

    medians = engines.interleave({"a": work("a", [9, 1, 2, 3]), "b": work("b", [9, 4, 5, 6])}, repeats=3)
    assert medians == {"a": 2, "b": 5}
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
