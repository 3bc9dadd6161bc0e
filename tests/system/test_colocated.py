"""Encoders in the processes of language engines: exact through every path that such a process can take, and after the
death of one."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from deploy.processes import Child
from tests.support.cluster import LANGUAGE, Client, Cluster, cluster
from tests.support.pictures import image_file, image_part
from tests.system.cases import CASES, MAX_TOKENS, Case
from tests.system.topologies import ready
from tests.system.videos import VIDEOS

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

WHOLE, APART = "internvl", "qwen3_vl"
ENCODES = ("--encode", "--encoder-port", "0")
MEDIA = [case for case in CASES if case.images]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole() -> AsyncIterator[Cluster]:
    async with cluster(WHOLE, "2epd", role_arguments={"whole": LANGUAGE}) as engines:
        yield engines


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_one_process_for_all_stages_equals_the_reference(whole: Cluster, case: Case) -> None:
    answer = await whole.chat(case.content, max_tokens=MAX_TOKENS, stream=True)
    assert (answer.status, answer.done) == (200, True), answer.error
    assert answer.text == case.expected(WHOLE)
    assert answer.headers["x-triptych-route"].split(";")[0] == ("EPD" if case.images else "PD")


async def test_a_video_too(whole: Cluster) -> None:
    answer = await whole.chat(VIDEOS[0].content, max_tokens=MAX_TOKENS)
    assert (answer.status, answer.text) == (200, VIDEOS[0].expected(WHOLE)), answer.error


async def test_many_at_once_say_what_each_says_alone_and_hold_nothing(whole: Cluster) -> None:
    answers = await asyncio.gather(*(whole.chat(case.content, max_tokens=MAX_TOKENS) for case in 4 * CASES))
    for case, answer in zip(4 * CASES, answers, strict=True):
        assert answer.text == case.expected(WHOLE), (case.name, answer.error)
    await whole.idle()


async def test_the_death_of_one_while_it_encodes_is_nobodys(whole: Cluster) -> None:
    """What it had is asked of the other one."""
    parts = [image_part(image_file(500, 400, seed=40 + n)) for n in range(4)]
    question = {"type": "text", "text": "Which is it?"}
    wanted = await asyncio.gather(*(whole.chat([part, question], max_tokens=4) for part in parts))
    fresh = [image_part(image_file(500, 400, seed=40 + n, format="BMP")) for n in range(4)]  # the same, not cached
    asked = [asyncio.create_task(whole.chat([part, question], max_tokens=4)) for part in fresh]
    await asyncio.sleep(0.05)
    whole.engine("whole").signal(signal.SIGKILL)
    answers = await asyncio.gather(*asked)
    assert [answer.status for answer in answers] == [200] * 4, [answer.error for answer in answers]
    assert [answer.text for answer in answers] == [answer.text for answer in wanted]


async def test_encode_and_prefill_in_one_process_and_decode_in_another() -> None:
    """A proxy sees the encoder within as one of its own: at a port of its own."""
    async with cluster(APART, "1p1d", role_arguments={"prefill": (*LANGUAGE, *ENCODES)}) as engines:
        urls = {role: engines.engine(role).url for role in ("prefill", "decode")}
        encoder = (await engines.info("prefill"))["encoder"]["url"]
        flags = ["--port", "0", "--host", "127.0.0.1", "--encode-servers-urls", encoder]
        flags += ["--prefill-servers-urls", urls["prefill"], "--decode-servers-urls", urls["decode"]]
        proxy = Child("proxy of three", "proxy", flags)
        await proxy.start()
        try:
            client: Client = engines.client(proxy)
            await ready(client)
            answers = await asyncio.gather(*(client.chat(case.content, max_tokens=MAX_TOKENS) for case in MEDIA))
            for case, answer in zip(MEDIA, answers, strict=True):
                assert answer.text == case.expected(APART), (case.name, answer.error)
                assert answer.headers["x-triptych-route"].split(";")[0] == "E-P-D"
            await engines.idle()
            told = await engines.info("prefill")
            assert told["encoder"]["cache"]["pinned"] <= 1, (
                "only the picture that the proxy tries encoders with is held"
            )
        finally:
            await proxy.stop()
