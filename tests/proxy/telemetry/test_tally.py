"""Counts of several workers in one folder. Each is a process, as where metrics are kept is a process's own affair."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from proxy.telemetry import tally

WORKER = """
import os, sys
from pathlib import Path
from proxy.telemetry import tally
folder, worker, times = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tally.install(folder, worker)
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
registry = CollectorRegistry()
counter = Counter("triptych_x", "what", ["path"], registry=registry)
flying = Gauge("triptych_flying", "now", registry=registry, multiprocess_mode="livesum")
seconds = Histogram("triptych_s", "long", buckets=(1.0, 2.0), registry=registry)
for _ in range(times):
    counter.labels("P-D").inc()
    flying.inc()
    seconds.observe(1.5)
assert flying._value.get() == times
os.kill(os.getpid(), 9)
"""


def work(folder: Path, worker: int, times: int) -> None:
    assert subprocess.run([sys.executable, "-c", WORKER, str(folder), str(worker), str(times)]).returncode == -9


def told(folder: Path) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(generate_latest(tally.summed(folder)).decode())
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


@pytest.mark.parametrize("workers", [1, 3])
def test_counts_add_up_and_go_on_where_a_killed_worker_ended(tmp_path: Path, workers: int) -> None:
    for worker in range(workers):
        work(tmp_path, worker, worker + 1)
    total = sum(range(1, workers + 1))
    found = told(tmp_path)
    assert (
        found["triptych_x_total", "P-D"]
        == found["triptych_flying",]
        == total
        == tally.live(tmp_path)["triptych_flying"]
    )
    tally.bury(tmp_path, 0)
    assert told(tmp_path).get(("triptych_flying",), 0) == total - 1 == tally.live(tmp_path)["triptych_flying"]
    work(tmp_path, 0, 5)  # its successor
    found = told(tmp_path)
    assert found["triptych_x_total", "P-D"] == found["triptych_s_count",] == total + 5
    assert found["triptych_s_bucket", "1.0"] == 0
    assert found["triptych_s_bucket", "2.0"] == found["triptych_s_bucket", "+Inf"] == total + 5
    assert found["triptych_flying",] == total - 1 + 5


def test_a_file_that_grows_keeps_every_count(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from proxy.telemetry import tally
tally.install(Path(sys.argv[1]), 0)
from prometheus_client import CollectorRegistry, Counter
counter = Counter("triptych_x", "what", ["path"], registry=CollectorRegistry())
early = counter.labels("early")
for number in range(2000):
    counter.labels(str(number)).inc()
    early.inc()
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert (tmp_path / "counter_0.db").stat().st_size > 1 << 16
    found = told(tmp_path)
    assert found["triptych_x_total", "early"] == 2000
    assert all(found["triptych_x_total", str(number)] == 1 for number in range(2000))


def test_a_workers_files_are_whole_from_their_first_moment(tmp_path: Path) -> None:
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(n), "1"]) for n in range(3)]
    while any(worker.poll() is None for worker in workers):
        told(tmp_path)  # raises where a file is half made
    assert {worker.returncode for worker in workers} == {-9}
    assert told(tmp_path)["triptych_x_total", "P-D"] == 3


ALONE = """
from proxy.telemetry import tally
tally.install_alone()
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
registry = CollectorRegistry()
Counter("triptych_x", "what", ["path"], registry=registry).labels("P-D").inc(2)
gauge = Gauge("triptych_now", "now", registry=registry)
gauge.set(5)
gauge.dec()
Histogram("triptych_s", "long", buckets=(1.0, 2.0), registry=registry).observe(1.5)
print(generate_latest(registry).decode())
"""


def test_a_process_alone_counts_the_same_without_locks() -> None:
    text = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True).stdout
    for line in ('triptych_x_total{path="P-D"} 2.0', "triptych_now 4.0", "triptych_s_sum 1.5"):
        assert line in text.splitlines()
    assert [line for line in text.splitlines() if line.startswith("triptych_s_bucket")] == [
        'triptych_s_bucket{le="1.0"} 0.0',
        'triptych_s_bucket{le="2.0"} 1.0',
        'triptych_s_bucket{le="+Inf"} 1.0',
    ]


CELL = """
import sys
from pathlib import Path
from proxy.telemetry import tally
{installed}
from prometheus_client import CollectorRegistry, Counter, generate_latest
registry = CollectorRegistry()
counter = Counter("triptych_x", "what", registry=registry)
counter.inc(2)
cell = tally.cell(counter._value)
cell[0] += 3
assert cell[0] == 5
shown = tally.summed(Path(sys.argv[1])) if "folder" in sys.argv[2] else registry
print(generate_latest(shown).decode())
"""


@pytest.mark.parametrize("installed", ["", "tally.install_alone()", "tally.install(Path(sys.argv[1]), 0)  # folder"])
def test_what_is_added_to_a_cell_is_counted(installed: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CELL.format(installed=installed), str(tmp_path), installed]
    assert "triptych_x_total 5.0" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
