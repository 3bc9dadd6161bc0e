from __future__ import annotations

from functools import cache
from typing import Any

from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from engines.language.answers import Answer, usage_of
from engines.language.choices import Choice
from engines.language.sequence import SamplingParams
from engines.language.stream import Token
from engines.language.tokenizer import ChatTokenizer
from tests.support.checkpoints import checkpoint


@cache
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(checkpoint("qwen2_5_vl"))


def answer(chat: bool, **fields: Any) -> Answer:
    return Answer(**{"id": "x-1", "model": "tiny", "created": 5, "chat": chat, "logprobs": False, **fields})


def spoken(index: int = 0) -> Choice:
    a, b = tokenizer().encode("é")
    (c,) = tokenizer().encode("c")
    choice = Choice(index, tokenizer(), SamplingParams(max_tokens=3, logprobs=1))
    choice.push([Token(index, a, -1.0, ((a, -1.0),)), Token(index, b, -2.0, ((c, -0.5),))])
    choice.push([Token(index, c, -3.0, (), "length")])
    return choice


def test_a_whole_chat_answer_is_what_openai_reads() -> None:
    choices = [spoken(0), spoken(1)]
    usage = usage_of(7, choices)
    body = answer(True, logprobs=True).whole(choices, usage, {"do_remote_prefill": True})
    read = ChatCompletion.model_validate(body)
    assert [choice.message.content for choice in read.choices] == ["éc", "éc"]
    assert read.usage is not None
    assert (read.usage.prompt_tokens, read.usage.completion_tokens, read.usage.total_tokens) == (7, 6, 13)
    logprobs = read.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [(entry.bytes, entry.logprob) for entry in logprobs.content] == [([195], -1.0), ([169], -2.0), ([99], -3.0)]
    assert logprobs.content[1].top_logprobs[0].token == "c"
    assert body["kv_transfer_params"] == {"do_remote_prefill": True}


def test_a_whole_completion_is_what_openai_reads() -> None:
    body = answer(False, logprobs=True).whole([spoken()], usage_of(7, [spoken()]), None)
    read = Completion.model_validate(body)
    assert (read.choices[0].text, read.choices[0].finish_reason) == ("éc", "length")
    logprobs = read.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [-1.0, -2.0, -3.0]
    assert logprobs.tokens is not None
    assert logprobs.tokens[2] == "c"
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[2] == {"c": -3.0}
    assert len(logprobs.text_offset or ()) == 3


def test_a_stream_adds_up_to_the_whole() -> None:
    said = spoken()
    shape = answer(True, include_usage=True)
    chunks = [shape.opening(0), *(shape.chunk(piece) for piece in said.pieces), shape.closing(usage_of(7, [said]))]
    read = [ChatCompletionChunk.model_validate(chunk) for chunk in chunks]
    assert read[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in read[:-1]) == said.text
    assert read[-2].choices[0].finish_reason == "length"
    assert read[-1].choices == []
    assert read[-1].usage is not None
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_completions_stream_text_and_no_usage_unless_asked() -> None:
    chunk = answer(False).chunk(spoken().pieces[1])
    assert chunk["choices"] == [{"index": 0, "text": "c", "logprobs": None, "finish_reason": "length"}]
    assert "usage" not in chunk
