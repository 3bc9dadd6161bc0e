import pytest

from bench.scripted import answers
from bench.scripted.client import Answer, Client, Ending
from bench.scripted.engine import Engine
from bench.scripted.faults import AFTER_TOKENS, Fault
from bench.scripted.verdict import Verdict, judge

TOKENS = 8
PATIENCE_S = 0.25

# fault: (status, ending, verdict) of an unstreamed answer and of a stream, through no proxy at all
EXPECTED = {
    Fault.RESET: [(0, Ending.BROKEN, Verdict.ABORT)] * 2,
    Fault.SERVER_ERROR: [(500, Ending.COMPLETE, Verdict.ERROR)] * 2,
    Fault.BUSY: [(429, Ending.COMPLETE, Verdict.ERROR)] * 2,
    Fault.CLIENT_ERROR: [(400, Ending.COMPLETE, Verdict.ERROR)] * 2,
    Fault.HANG: [(0, Ending.HUNG, Verdict.HUNG)] * 2,
    Fault.GARBAGE: [(0, Ending.BROKEN, Verdict.ABORT)] * 2,
    Fault.HTML: [(200, Ending.COMPLETE, Verdict.LIE)] * 2,
    Fault.SHORT: [(200, Ending.BROKEN, Verdict.ABORT), (200, Ending.COMPLETE, Verdict.LIE)],
    Fault.ERROR_EVENT: [(200, Ending.COMPLETE, Verdict.LIE), (200, Ending.COMPLETE, Verdict.ERROR)],
    Fault.CUT: [(200, Ending.BROKEN, Verdict.ABORT)] * 2,
    Fault.STALL: [(200, Ending.HUNG, Verdict.HUNG)] * 2,
}


async def faulty(fault: Fault, *, stream: bool) -> Answer:
    async with Engine("both") as engine:
        engine.fault = fault
        client = Client(engine.url)
        body = answers.request("q", TOKENS, stream=stream)
        answer = await client.post(answers.CHAT, body, timeout=PATIENCE_S)
        client.close()
        assert engine.counters.failed == 1
        return answer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", Fault)
async def test_each_fault_looks_like_itself(fault: Fault, stream: bool) -> None:
    answer = await faulty(fault, stream=stream)
    verdict = judge(answer, answers.text("q", TOKENS), stream=stream)
    assert (answer.status, answer.ending, verdict) == EXPECTED[fault][stream]


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.STALL, Fault.SHORT])
async def test_streams_break_after_some_tokens(fault: Fault) -> None:
    answer = await faulty(fault, stream=True)
    assert answer.body == b"".join(list(answers.events("", "q", TOKENS))[:AFTER_TOKENS]).replace(
        b'"chatcmpl-"', answer.body[len(b'data: {"id":') :].partition(b",")[0]
    )
