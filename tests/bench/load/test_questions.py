"""Questions: real images, the asked mixture, and the same again for the same seed."""

from __future__ import annotations

import base64
import io
from itertools import islice
from typing import Any

import orjson
from PIL import Image

from bench.load.questions import Mixture, Question, questions


def some(mixture: Mixture, count: int = 40, seed: int = 1) -> list[Question]:
    return list(islice(questions(mixture, seed), count))


def pictures(question: Question) -> list[bytes]:
    content = orjson.loads(question.body)["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    return [base64.b64decode(url.partition(",")[2]) for url in urls]


def test_the_same_seed_asks_the_same_and_another_seed_another() -> None:
    mixture = Mixture("m", images=1, share=0.5)
    assert some(mixture) == some(mixture) != some(mixture, seed=2)


def test_a_text_question_is_a_plain_string_of_so_many_words() -> None:
    body: dict[str, Any] = orjson.loads(some(Mixture("m", words=7, tokens=5), 1)[0].body)
    assert len(body["messages"][0]["content"].split()) == 7
    assert (body["model"], body["max_tokens"], body["min_tokens"]) == ("m", 5, 5)
    assert body["stream"] and body["stream_options"] == {"include_usage": True}


def test_whole_answers_that_may_end_early_ask_for_neither_stream_nor_length() -> None:
    body = orjson.loads(some(Mixture("m", stream=False, exact=False, extra={"top_p": 0.5}), 1)[0].body)
    assert body["top_p"] == 0.5 and not body["stream"]
    assert not {"stream_options", "ignore_eos", "min_tokens"} & body.keys()


def test_images_are_real_have_the_asked_sizes_in_turn_and_are_all_different() -> None:
    found = [data for q in some(Mixture("m", images=2, sizes=((64, 48), (32, 80))), 10) for data in pictures(q)]
    assert [Image.open(io.BytesIO(data)).size for data in found[:4]] == [(64, 48), (32, 80)] * 2
    assert len(set(found)) == len(found) == 20
    Image.open(io.BytesIO(found[-1])).load()


def test_few_distinct_images_come_again() -> None:
    found = [data for q in some(Mixture("m", images=1, distinct=3, sizes=((16, 16),))) for data in pictures(q)]
    assert len(set(found)) == 3


def test_only_a_share_of_the_requests_has_images() -> None:
    kinds = [question.kind for question in some(Mixture("m", images=1, share=0.25, sizes=((8, 8),)), 400)]
    assert 70 < kinds.count("image") < 130
