import pytest

from bench.scripted import answers
from bench.scripted.engine import Engine
from bench.scripted.faults import Fault
from bench.scripted.load import NotServed, Workload, connected, drive


def workload(**more: int) -> Workload:
    body = answers.request("q", 3, stream=True)
    return Workload("w", body, True, 3, clients=2, each=3, **more)


async def test_every_client_sends_its_requests() -> None:
    async with Engine("both") as engine, connected(engine.url, 2) as clients:
        got = await drive(clients, workload(spread=0.01))
        assert len(got) == workload().requests == 6
        assert engine.counters.calls == 2 + 6  # the warm-up's


async def test_an_answer_that_is_not_whole_ends_the_run() -> None:
    async with Engine("both") as engine, connected(engine.url, 2) as clients:
        engine.fault = Fault.SHORT
        with pytest.raises(NotServed, match="lie: status 200"):
            await drive(clients, workload())


async def test_a_server_that_does_not_serve_is_noticed_before_the_run() -> None:
    async with Engine("both") as engine:
        engine.fault = Fault.BUSY
        with pytest.raises(NotServed, match="429"):
            async with connected(engine.url, 1):
                pass
