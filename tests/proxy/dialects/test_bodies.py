"""What of a client's request goes where, whatever the family."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy import openai
from proxy.core import Api, Job
from proxy.dialects import bodies
from proxy.dialects.base import BadReply
from proxy.errors import BadRequest
from proxy.openai import Identity
from tests.fakes.media import chat, image, part


def job(body: dict[str, Any], api: Api = Api.CHAT) -> Job:
    return openai.parse(orjson.dumps(body), api, "id", Identity())


def test_an_encoder_gets_parts_and_what_is_not_about_the_answer() -> None:
    asked = {"stream": True, "max_tokens": 9, "tools": [1], "mm_processor_kwargs": {"a": 1}, "odd": {"kept": True}}
    body = bodies.for_encoder(job(chat(part(image()), text="secret", **asked)), [{"type": "x"}])
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": [{"type": "x"}]}],
        "mm_processor_kwargs": {"a": 1},
        "odd": {"kept": True},
        "stream": False,
    }
    assert list(body)[:2] == ["model", "messages"], "in the client's order"


def test_parts_are_replaced_in_their_places_and_the_rest_is_the_clients_own() -> None:
    asked = chat(part(image(8, 8)), part(image(16, 8)))
    asked["messages"] = [{"role": "system", "content": "plain"}, *asked["messages"]]
    j = job(asked)
    body = bodies.with_parts(j, lambda item: {"item": item.index})
    assert body["messages"][1]["content"] == [j.body["messages"][1]["content"][0], {"item": 0}, {"item": 1}]
    assert body["messages"][0] is j.body["messages"][0]
    assert j.body == asked


def test_one_token_whole() -> None:
    asked = {"stream": True, "stream_options": {}, "max_tokens": 9, "max_completion_tokens": 8, "min_tokens": 2, "n": 3}
    body = bodies.of_one_token(asked | {"temperature": 0})
    assert body == {"stream": False, "max_tokens": 1, "max_completion_tokens": 1, "n": 1, "temperature": 0}
    assert bodies.of_one_token({}) == {"stream": False, "max_tokens": 1}


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("a", 1), ([1, 2], 1), (["a"], 1), ([[1, 2]], 1), (["a", "b"], 2), ([[1, 2], [3]], 2), ([], 1)],
)
def test_prompts_are_counted_as_engines_do(prompt: Any, count: int) -> None:
    j = job({"prompt": prompt}, Api.COMPLETIONS)
    assert len(bodies.prompts(j)) == count
    if count == 1:
        bodies.one_prompt(j)
    else:
        with pytest.raises(BadRequest, match="one by one"):
            bodies.one_prompt(j)


def test_an_entrys_modality_is_the_items_where_it_names_none() -> None:
    j = job(chat({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}))
    found = bodies.handles(j.items, {"h": {"item_indices": [0], "metadata": {"audio_num_tokens": 3}}})
    assert bodies.embeds(found[0], "u") == {
        "type": "audio_embeds",
        "audio_embeds": {"audio_num_tokens": 3},
        "uuid": "u",
    }


def test_an_item_that_was_not_published_has_no_handle_and_is_no_mistake() -> None:
    j = job(chat(part(image(8, 8)), part(image(16, 8))))
    entries = {
        "a": {"item_indices": [0], "metadata": {}},
        "b": {"item_indices": [1], "metadata": {"image_grid_thw": [1]}},
    }
    assert set(bodies.handles(j.items, entries)) == {1}


@pytest.mark.parametrize("positions", [None, 0, "0"])
def test_positions_that_are_no_list_are_no_reply(positions: Any) -> None:
    with pytest.raises(BadReply, match="no list of items"):
        bodies.handles(job(chat(part(image()))).items, {"a": {"item_indices": positions, "metadata": {}}})
