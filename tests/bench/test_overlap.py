from bench.overlap import compare, connected
from bench.report import Report
from tests.support.checkpoints import checkpoint


async def test_all_modes_bring_every_byte_across() -> None:
    report = Report("overlap")
    async with connected(checkpoint("qwen3_vl"), "shm", 64) as sender:
        await compare(report, sender, "shm", 64, {"after": None, "layers 1": 1, "layers 4": 4}, repeats=1)
        assert set(sender.transfer.audit().values()) == {0}
    assert [row["mode"] for row in report.rows] == ["after", "layers 1", "layers 4"]
    assert all(row["exposed_ms"] > 0 and row["compute_ms"] > 0 for row in report.rows)
    assert len(report.bars) == 1
