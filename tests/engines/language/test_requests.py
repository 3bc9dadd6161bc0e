from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from engines.errors import BadRequest
from engines.language.requests import Generation, Served, parse
from engines.language.scheduler import Limits
from engines.language.sequence import SamplingParams
from engines.language.tokenizer import ChatTokenizer
from tests.support.checkpoints import checkpoint

LIMITS = Limits(num_blocks=20, block_size=16, max_model_len=1000, max_num_seqs=4, max_batched_tokens=64)
VOCAB = 300


@cache
def served() -> Served:
    return Served(ChatTokenizer(checkpoint("qwen2_5_vl")), LIMITS, VOCAB)


def chat(content: object = "Hi", prefill_only: bool = False, **fields: Any) -> Generation:
    return parse({"messages": [{"role": "user", "content": content}], **fields}, True, served(), prefill_only)


def completion(prompt: object = "Hi", **fields: Any) -> Generation:
    return parse({"prompt": prompt, **fields}, False, served())


def image(grid: object = (1, 4, 6), **fields: Any) -> dict[str, Any]:
    described = {"image_grid_thw": list(grid) if isinstance(grid, tuple) else grid}
    return {"type": "image_embeds", "image_embeds": described, "uuid": "ab" * 32, **fields}


def video(**changes: Any) -> dict[str, Any]:
    described = {"video_grid_thw": [2, 4, 6], "second_per_grid_ts": 0.5, "timestamps": [0.25, 0.75], **changes}
    return {"type": "video_embeds", "video_embeds": described, "uuid": "cd" * 32}


def test_defaults_are_openais() -> None:
    parsed = chat()
    room = LIMITS.max_tokens - len(parsed.prompt.token_ids)
    assert parsed.params == SamplingParams(max_tokens=room)
    assert (parsed.stream, parsed.include_usage, parsed.prefix) == (False, False, "chatcmpl-")
    assert completion().params == SamplingParams(max_tokens=16)
    assert completion().prefix == "cmpl-"


def test_every_field_is_read_and_unknown_ones_are_not() -> None:
    parsed = chat(
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        seed=7,
        min_tokens=2,
        ignore_eos=True,
        stop=["a", "b"],
        stop_token_ids=[5],
        logprobs=True,
        top_logprobs=3,
        n=2,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        stream=True,
        stream_options={"include_usage": True},
        ec_transfer_params={"h": {}},
        kv_transfer_params={"do_remote_decode": True},
        some_extension={"x": 1},
        user=None,
    )
    assert parsed.params == SamplingParams(9, 0.5, 0.9, 40, 7, 2, True, ("a", "b"), (5,), 3, 2, 1.0, -1.0, 1.5)
    assert (parsed.stream, parsed.include_usage) == (True, True)
    assert parsed.embeddings == {"h": {}}
    assert parsed.kv == {"do_remote_decode": True}


def test_forms_of_the_same() -> None:
    assert chat(max_tokens=9, max_completion_tokens=5).params.max_tokens == 5
    assert chat(stop="x").params.stop == ("x",)
    assert chat(temperature=1.0, seed=3.0).params.seed == 3
    assert completion(logprobs=0).params.logprobs == 0
    assert chat(logprobs=True).params.logprobs == 0
    assert chat(logprobs=False).params.logprobs is None
    assert completion([5, 6]).prompt.token_ids == [5, 6]
    assert completion([[5, 6]]).prompt.token_ids == [5, 6]
    assert completion(["Hi"]) == completion("Hi")


def test_items_have_their_places() -> None:
    parsed = chat([{"type": "text", "text": "see"}, image(), image(grid=[[1, 2, 2]])])
    first, second = parsed.prompt.items
    assert (first.mm_hash, first.modality, first.grid, first.num_tokens) == ("ab" * 32, "image", (1, 4, 6), 6)
    assert (second.grid, second.num_tokens) == ((1, 2, 2), 1)
    (token,) = set(parsed.prompt.token_ids) & served().tokenizer.pads
    assert parsed.prompt.token_ids[first.offset : first.offset + 6] == [token] * 6


def test_a_video_tells_how_far_its_steps_are_apart() -> None:
    (item,) = chat([video(), {"type": "text", "text": "see"}]).prompt.items
    assert (item.mm_hash, item.modality, item.grid, item.num_tokens) == ("cd" * 32, "video", (2, 4, 6), 12)
    assert item.interval == 2 * 0.5, "tokens_per_second of the checkpoint is 2"


def test_audio_is_refused_with_the_reason() -> None:
    with pytest.raises(BadRequest, match="this model has no audio") as raised:
        chat([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}])
    assert raised.value.code == "unsupported_modality"


def test_tools_reach_the_template() -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    plain, tools, none = chat(), chat(tools=[tool]), chat(tools=[tool], tool_choice="none")
    assert none.prompt == plain.prompt
    assert len(tools.prompt.token_ids) >= len(plain.prompt.token_ids)


def test_prefill_samples_one_token_whatever_is_asked() -> None:
    parsed = chat(prefill_only=True, max_tokens=1, min_tokens=7, n=3, temperature=99, logprobs=True)
    assert parsed.params == SamplingParams(max_tokens=1, temperature=0.0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -3}, "max_completion_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"n": 0}, "n"),
        ({"seed": "x"}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"ec_transfer_params": []}, "ec_transfer_params"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"max_tokens": 2000}, "messages"),
    ],
)
def test_wrong_values_are_refused_with_their_path(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as raised:
        chat(**fields)
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image_url", "image_url": {"url": "data:,"}}, "messages[0].content[0]"),
        ({"type": "input_audio"}, "messages[0].content[0]"),
        ({"type": "smell"}, "messages[0].content[0]"),
        (image(grid=[1, 2]), "messages[0].content[0].image_embeds.image_grid_thw"),
        (image(grid=[1, 0, 2]), "messages[0].content[0].image_embeds.image_grid_thw"),
        (image(uuid=None), "messages[0].content[0].uuid"),
        (image(image_embeds=None), "messages[0].content[0].image_embeds.image_grid_thw"),
        ({"type": "video_url", "video_url": {"url": "data:,"}}, "messages[0].content[0]"),
        (video(video_grid_thw=[2, 4]), "messages[0].content[0].video_embeds.video_grid_thw"),
        (video(timestamps=[0, -1]), "messages[0].content[0].video_embeds.timestamps"),
        (video(timestamps="soon"), "messages[0].content[0].video_embeds.timestamps"),
        (video(second_per_grid_ts="1"), "messages[0].content[0].video_embeds.second_per_grid_ts"),
        (video(second_per_grid_ts=float("nan")), "messages[0].content[0].video_embeds.second_per_grid_ts"),
        (video(second_per_grid_ts=None), "messages"),
    ],
)
def test_parts_that_this_engine_cannot_take(part: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as raised:
        chat([part])
    assert raised.value.param == param


@pytest.mark.parametrize("prompt", [None, 5, ["a", "b"], [VOCAB], [-1], [], {"x": 1}, ""])
def test_prompts_that_are_none(prompt: object) -> None:
    with pytest.raises(BadRequest) as raised:
        completion(prompt)
    assert raised.value.param == "prompt"


def test_echo_is_refused_and_not_ignored() -> None:
    with pytest.raises(BadRequest, match="echo"):
        completion(echo=True)


def test_the_cache_is_a_limit_too() -> None:
    with pytest.raises(BadRequest, match="20 blocks of 16 tokens") as raised:
        chat(max_tokens=400)
    assert raised.value.code == "context_length_exceeded"


def test_continued_tokens_are_prompt_and_output_at_once() -> None:
    fresh, on = (
        completion("Hi", max_tokens=9, min_tokens=4),
        completion("Hi", max_tokens=9, min_tokens=4, continue_token_ids=[5, 6]),
    )
    assert on.prompt.token_ids == [*fresh.prompt.token_ids, 5, 6]
    assert (on.params, on.continued) == (fresh.params, (5, 6))
    assert (on.to_run.max_tokens, on.to_run.min_tokens) == (7, 2)
    assert fresh.to_run == fresh.params


def test_a_prefill_of_continued_tokens_is_one_of_a_longer_prompt() -> None:
    fresh, on = chat(prefill_only=True), chat(prefill_only=True, continue_token_ids=[5, 6], max_tokens=2)
    assert on.prompt.token_ids == [*fresh.prompt.token_ids, 5, 6]
    assert (on.continued, on.to_run.max_tokens) == ((), 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"continue_token_ids": [VOCAB]},
        {"continue_token_ids": "text"},
        {"continue_token_ids": [1, 2], "max_tokens": 2},
        {"continue_token_ids": [1], "n": 2},
        {"continue_token_ids": [1], "presence_penalty": 0.5},
    ],
)
def test_what_cannot_go_on_exactly_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as refused:
        chat(**fields)
    assert refused.value.param == "continue_token_ids"
