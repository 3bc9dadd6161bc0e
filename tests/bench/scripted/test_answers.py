import base64

import orjson
from blake3 import blake3

from bench.scripted import answers


def test_a_request_has_its_tag_and_its_size() -> None:
    body = answers.request("q7", 5, stream=True, size=900)
    assert answers.tag_of(body) == "q7"
    assert 900 < len(body) < 1100
    assert orjson.loads(body)["stream"] is True


def test_parsing_leaves_base64_out_and_all_else_in() -> None:
    pictures = [answers.image(3000, seed) for seed in (1, 2)]
    body = answers.request("q7", 5, stream=False, images=pictures)
    content = answers.parse(body)["messages"][0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "image_url"]
    assert content[1]["image_url"]["url"] == "data:image/png;base64,"
    assert len(answers.elided(body)) < 1000
    assert answers.parse(b"[]") == answers.parse(b"no") == {}
    assert answers.elided(b'"a;base64,unfinished') == b'"a;base64,unfinished'


def test_images_are_of_their_size_and_differ() -> None:
    pictures = [answers.image(1000, seed) for seed in (1, 2, 1)]
    assert [len(picture) for picture in pictures] == [1000] * 3
    assert len({blake3(picture).hexdigest() for picture in pictures}) == 2
    assert base64.b64decode(answers.data_url(pictures[0]).partition(",")[2]) == pictures[0]


def test_a_stream_says_what_a_whole_answer_says() -> None:
    events = list(answers.events("id", "q7", 4))
    assert len(events) == 4
    lines = [line[6:] for line in b"".join(events).split(b"\n\n") if line]
    assert lines[-1] == b"[DONE]"
    choices = [orjson.loads(line)["choices"][0] for line in lines[:-1]]
    said = "".join(choice["delta"].get("content", "") for choice in choices)
    whole = answers.whole("id", answers.text("q7", 4), 4)
    assert said == whole["choices"][0]["message"]["content"] == " q7.0 q7.1 q7.2 q7.3"
    assert choices[-1]["finish_reason"] == "stop"
