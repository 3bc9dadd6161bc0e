from __future__ import annotations

import pytest

from bench.simulator.models import H100, QWEN3_VL_30B
from bench.simulator.parsing import Parser, prompt
from bench.simulator.requests import Media, Request, Text
from proxy.balancer.prefix import Chain
from proxy.media.vision import FAMILIES

QWEN3 = FAMILIES["qwen3_vl"]
VISION = QWEN3_VL_30B.vision(H100)
CAT, DOG = Media("cat", 1280, 720), Media("dog", 640, 480)


def test_a_job_has_an_item_for_each_image_with_its_identity_and_predicted_size() -> None:
    job = Parser(QWEN3).job(Request((CAT, Text(50), DOG), 20))
    assert [(item.index, item.part, item.identity) for item in job.items] == [(0, 0, "cat"), (1, 2, "dog")]
    assert [item.tokens for item in job.items] == [880, 300]
    assert job.items[0].work > 3 * job.items[1].work
    assert job.items[0].nbytes == 880 * QWEN3.embedding_bytes
    assert (job.text_tokens, job.output_tokens) == (50, 20)


def test_the_proxy_predicts_the_tokens_that_engines_count() -> None:
    request = Request((Media("", 1920, 1080), Media("", 4032, 3024), Media("", 3840, 2160)))
    for item, media in zip(Parser(QWEN3).job(request).items, request.media, strict=True):
        assert item.tokens == pytest.approx(VISION.cost(media).tokens, rel=0.01)


def test_prompts_begin_alike_for_proxy_and_engine_where_their_parts_do() -> None:
    parser = Parser(QWEN3)
    system = Text(2000, "system")
    requests = [
        Request((system, CAT, Text(2000, "one"))),
        Request((system, CAT, Text(2000, "two"))),
        Request((system, DOG, Text(2000, "one"))),
        Request((Text(2000), CAT)),
        Request((Text(2000), CAT)),
    ]
    chains = [list(Chain.of(parser.job(request)).keys) for request in requests]
    keys = [[part.key for part in prompt(request, VISION)] for request in requests]
    for told in (chains, keys):
        alike = [sum(a == b for a, b in zip(told[0], other, strict=False)) for other in told]
        assert alike[0] > alike[1] > alike[2] > 0
    assert chains[3][0] != chains[4][0]
    assert keys[3] == [None, None]


def test_a_prompt_ends_with_all_of_its_tokens() -> None:
    parts = prompt(Request((Text(10), CAT, Text(5))), VISION)
    assert [part.end for part in parts] == [10, 890, 895]
    assert [part.media for part in parts] == [None, CAT, None]


def test_media_mean_nothing_where_nobody_can_see() -> None:
    with pytest.raises(ValueError, match="can see"):
        prompt(Request((CAT,)), None)
