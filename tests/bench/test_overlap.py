import pytest

from bench.overlap import compare, connected, hidden
from bench.report import Report
from tests.support.checkpoints import checkpoint


async def test_all_modes_bring_every_byte_across() -> None:
    report = Report("overlap")
    async with connected(checkpoint("qwen3_vl"), "shm", 64) as sender:
        await compare(report, sender, "shm", 64, {"after": None, "layers 1": 1, "layers 4": 4}, repeats=1)
        assert set(sender.transfer.audit().values()) == {0}
    assert [row["mode"] for row in report.rows] == ["after", "layers 1", "layers 4"]
    assert all(row["exposed_ms"] >= 0 and row["compute_ms"] > 0 for row in report.rows)
    assert report.rows[0]["exposed_ms"] == report.rows[0]["told_ms"] > 0
    assert [bar.name for bar in report.bars] == ["shm 64: exposed / prefill", "shm 64: percent hidden"]


def test_what_is_hidden_is_of_what_a_push_afterwards_leaves() -> None:
    assert hidden({"after": 0.1, "layers 4": 0.001}, "layers 4") == pytest.approx(99)
