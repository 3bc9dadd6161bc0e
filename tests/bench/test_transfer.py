import argparse
import json

import pytest

from bench import transfer
from bench.report import Report


def test_one_repeat_measures_every_transport_and_prints_the_contract(capsys):
    # whether the bars hold is the bench's own business: a test machine may be busy with anything
    assert transfer.main(["--json", "--repeats", "1"]) in (0, 1)
    printed = json.loads(capsys.readouterr().out)
    assert printed["bench"] == "transfer"
    shapes = {shape.name for shape in transfer.shapes()}
    measured = {(row["transport"], row["shape"]) for row in printed["rows"]}
    assert measured >= {(name, shape) for name in ("memcpy", "raw TCP", "shm", "zmq", "storage") for shape in shapes}
    assert all(row["us"] > 0 for row in printed["rows"])
    assert {f"shm over memcpy, {shape}" for shape in ("16 MiB", "1000 x 16 KiB")} <= {
        bar["name"] for bar in printed["bars"]
    }


def test_shapes_fit_their_arenas_and_are_what_they_say():
    large, scattered, small = transfer.shapes()
    assert [shape.nbytes for shape in (large, scattered, small)] == [16 << 20, 1000 * (16 << 10), 4096]
    for shape in (large, scattered, small):
        for spans in (shape.source, shape.target):
            assert len({offset for offset, _ in spans}) == len(spans)
            assert all(offset >= 0 and offset + length <= transfer.ARENA for offset, length in spans)


@pytest.mark.parametrize(("factor", "status"), [(1.2, 0), (1.4, 1)])
def test_the_bar_of_shared_memory_decides_the_exit_status(factor, status):
    report = Report("transfer")
    names = [shape.name for shape in transfer.shapes()]
    load = (1.0, 5.0, 1.0)  # the machine's, which both meet alike
    times = {("memcpy", name): list(load) for name in names}
    times |= {("shm", name): [factor * one for one in load] for name in names}
    transfer.fill(report, times, ["memcpy", "shm"])
    assert report.emit(argparse.Namespace(json=True, plot=None)) == status
