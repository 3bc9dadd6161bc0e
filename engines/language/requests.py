"""An OpenAI body becomes what to run, how to sample and how to answer. Pure; it waits for nothing and holds nothing.

Unknown fields are ignored, known ones with wrong values are refused with their path. The body is never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from engines.errors import BadRequest
from engines.language.prompt import MEDIA_PARTS, Media, Prompt, PromptError
from engines.language.scheduler import Limits, NeverFits
from engines.language.sequence import SamplingParams
from engines.language.tokenizer import ChatTokenizer

MAX_LOGPROBS = 20
MAX_STOPS = 16
NO_AUDIO = "unsupported_modality"
LONGEST_VIDEO = 1e6  # seconds: positions and timestamps of longer ones are nonsense
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; chat goes on to the end of the context

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Generation:
    """A parsed request. `prefix` and the request id make the answer's id.

    `continued`: tokens that another engine has generated for it already. They are the end of `prompt`, and count as
    output in `params`, in the text around them and in the usage; the answer goes on after them.
    """

    chat: bool
    prompt: Prompt
    params: SamplingParams
    stream: bool
    include_usage: bool
    embeddings: Mapping[str, Any]  # ec_transfer_params
    kv: Any  # kv_transfer_params, as sent
    token_ids: bool = False  # tell each piece's token ids
    continued: tuple[int, ...] = ()

    @property
    def to_run(self) -> SamplingParams:
        """What is left of `params` after the continued tokens."""
        params, done = self.params, len(self.continued)
        return replace(params, max_tokens=params.max_tokens - done, min_tokens=max(0, params.min_tokens - done))

    @property
    def prefix(self) -> str:
        return "chatcmpl-" if self.chat else "cmpl-"


@dataclass(frozen=True, slots=True)
class Served:
    """What this engine can read and hold."""

    tokenizer: ChatTokenizer
    limits: Limits
    vocab_size: int


def parse(body: Mapping[str, Any], chat: bool, served: Served, prefill_only: bool = False) -> Generation:
    """Read a body of /v1/chat/completions or /v1/completions. Raises BadRequest.

    `prefill_only`: one token is sampled, whatever the body says; the rest is the decode engine's.
    """
    prompt = _chat_prompt(body, served.tokenizer) if chat else _completion_prompt(body, served)
    if not prompt.token_ids:
        raise BadRequest("the prompt is empty", param="messages" if chat else "prompt")
    if prefill_only:
        params = SamplingParams(max_tokens=1, temperature=0.0)
    else:
        params = sampling_params(body, chat, served.limits.max_tokens - len(prompt.token_ids), served.vocab_size)
    continued = _continued(body, params, served, prefill_only)
    if continued:
        prompt = Prompt([*prompt.token_ids, *continued], prompt.items)
    done = () if prefill_only else continued
    try:
        served.limits.check(len(prompt.token_ids), params.max_tokens - len(done), params.n)
    except NeverFits as error:
        raise BadRequest(str(error), param="messages" if chat else "prompt", code="context_length_exceeded") from None
    stream = _flag(body, "stream")
    options = _object(body, "stream_options")
    return Generation(
        chat=chat,
        prompt=prompt,
        params=params,
        stream=stream,
        include_usage=_flag(options, "include_usage", "stream_options."),
        embeddings=_object(body, "ec_transfer_params"),
        kv=body.get("kv_transfer_params"),
        token_ids=_flag(body, "return_token_ids"),
        continued=done,
    )


def sampling_params(body: Mapping[str, Any], chat: bool, room: int, vocab_size: int) -> SamplingParams:
    """How to sample. `room`: tokens that the context leaves for the answer."""
    default = max(room, 1) if chat else COMPLETION_TOKENS
    named = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    max_tokens = _number(body, named, int, default, low=1)
    min_tokens = _number(body, "min_tokens", int, 0, low=0)
    if min_tokens > max_tokens:
        raise BadRequest(f"min_tokens {min_tokens} is more than {named} {max_tokens}", param="min_tokens")
    seed = body.get("seed")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_number(body, "temperature", float, 1.0, low=0.0, high=2.0),
        top_p=_number(body, "top_p", float, 1.0, low=0.0, high=1.0),
        top_k=_number(body, "top_k", int, 0, low=-1),
        seed=None if seed is None else _number(body, "seed", int, 0),
        min_tokens=min_tokens,
        ignore_eos=_flag(body, "ignore_eos"),
        stop=_stops(body),
        stop_token_ids=tuple(_list(body, "stop_token_ids", partial(_is_token, vocab_size), "this model's token ids")),
        logprobs=_chat_logprobs(body) if chat else _completion_logprobs(body),
        n=_number(body, "n", int, 1, low=1, high=128),
        presence_penalty=_number(body, "presence_penalty", float, 0.0, low=-2.0, high=2.0),
        frequency_penalty=_number(body, "frequency_penalty", float, 0.0, low=-2.0, high=2.0),
        repetition_penalty=_number(body, "repetition_penalty", float, 1.0, low=0.01, high=100.0),
    )


def _continued(body: Mapping[str, Any], params: SamplingParams, served: Served, prefill_only: bool) -> tuple[int, ...]:
    """What `continue_token_ids` says. Refused where going on would not be what one engine alone would have said."""
    name = "continue_token_ids"
    tokens = tuple(_list(body, name, partial(_is_token, served.vocab_size), "this model's token ids"))
    if not tokens or prefill_only:
        return tokens
    if params.n > 1 or params.presence_penalty or params.frequency_penalty:
        raise BadRequest(f"{name} goes with n=1 and without presence and frequency penalties", param=name)
    if len(tokens) >= params.max_tokens:
        raise BadRequest(f"{name} holds {len(tokens)} tokens, no fewer than may be generated at all", param=name)
    return tokens


# ---- prompts


def _chat_prompt(body: Mapping[str, Any], tokenizer: ChatTokenizer) -> Prompt:
    messages = _list(body, "messages", lambda value: isinstance(value, Mapping), "objects")
    if not messages:
        raise BadRequest("messages must hold at least one message", param="messages")
    tools = _list(body, "tools", lambda value: isinstance(value, Mapping), "objects") or None
    if body.get("tool_choice") == "none":
        tools = None
    options = {**_object(body, "chat_template_kwargs")}
    for name in ("add_generation_prompt", "continue_final_message"):
        if body.get(name) is not None:
            options[name] = _flag(body, name)
    try:
        return tokenizer.render_chat(messages, _media(messages), tools, options)
    except PromptError as error:
        raise BadRequest(str(error), param=error.param or "messages") from None


def _media(messages: list[Any]) -> list[Media]:
    """The items of the messages, in order, which must have been encoded elsewhere."""
    media = []
    for number, message in enumerate(messages):
        content = message.get("content")
        for index, part in enumerate(content if isinstance(content, list) else ()):
            kind = part.get("type") if isinstance(part, Mapping) else None
            path = f"messages[{number}].content[{index}]"
            if kind in ("image_embeds", "video_embeds"):
                media.append(_item(part, kind.removesuffix("_embeds"), path))
            elif kind in ("input_audio", "audio_url", "audio", "audio_embeds"):
                raise BadRequest(f"this model has no audio: {kind} is not served", param=path, code=NO_AUDIO)
            elif kind in MEDIA_PARTS:
                raise BadRequest(
                    f"this engine has no encoder and takes no {kind}: send image_url or video_url through the proxy",
                    param=path,
                    code="no_encoder",
                )
    return media


def _item(part: Mapping[str, Any], modality: str, path: str) -> Media:
    path_within, name = f"{path}.{modality}_embeds", f"{modality}_grid_thw"
    described = part.get(f"{modality}_embeds")
    described = described if isinstance(described, Mapping) else {}
    grid = described.get(name)
    if isinstance(grid, list) and len(grid) == 1 and isinstance(grid[0], list):
        grid = grid[0]
    if not (isinstance(grid, list) and len(grid) == 3 and all(type(n) is int and n > 0 for n in grid)):
        raise BadRequest(f"{name} must be three positive integers", param=f"{path_within}.{name}")
    mm_hash = part.get("uuid")
    if not isinstance(mm_hash, str) or not mm_hash:
        raise BadRequest("uuid must be the item's mm_hash", param=f"{path}.uuid")
    seconds = _list(described, "timestamps", _is_seconds, "seconds", f"{path_within}.")
    spacing = described.get("second_per_grid_ts") or 0.0
    if not _is_seconds(spacing):
        raise BadRequest("second_per_grid_ts must be a number of seconds", param=f"{path_within}.second_per_grid_ts")
    return Media(mm_hash, modality, (grid[0], grid[1], grid[2]), tuple(seconds), spacing)


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < LONGEST_VIDEO


def _completion_prompt(body: Mapping[str, Any], served: Served) -> Prompt:
    if _flag(body, "echo"):
        raise BadRequest("echo is not served", param="echo")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return Prompt(served.tokenizer.encode(prompt), ())
    if isinstance(prompt, list) and all(_is_token(served.vocab_size, token) for token in prompt):
        return Prompt(list(prompt), ())
    raise BadRequest(f"prompt must be one string or one list of token ids below {served.vocab_size}", param="prompt")


def _is_token(vocab_size: int, value: Any) -> bool:
    return type(value) is int and 0 <= value < vocab_size


# ---- values


def _flag(body: Mapping[str, Any], name: str, path: str = "") -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{path}{name} must be true or false, got {value!r}", param=f"{path}{name}")
    return bool(value)


def _number(
    body: Mapping[str, Any],
    name: str,
    kind: Callable[[Any], T],
    default: T,
    low: float = -(2**63),
    high: float = 2**63 - 1,
) -> T:
    value = body.get(name)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or (kind is int and value != int(value)):
        raise BadRequest(f"{name} must be a{'n integer' if kind is int else ' number'}, got {value!r}", param=name)
    if not low <= value <= high:
        ranges = f"at least {low:g}" if high >= 2**63 - 1 else f"between {low:g} and {high:g}"
        raise BadRequest(f"{name} must be {ranges}, got {value!r}", param=name)
    return kind(value)


def _object(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadRequest(f"{name} must be an object", param=name)
    return value


def _list(body: Mapping[str, Any], name: str, accepts: Callable[[Any], bool], what: str, path: str = "") -> list[Any]:
    value = body.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(accepts(entry) for entry in value):
        raise BadRequest(f"{name} must be a list of {what}", param=f"{path}{name}")
    return value


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get("stop")
    stops = [value] if isinstance(value, str) else _list(body, "stop", lambda entry: isinstance(entry, str), "strings")
    if len(stops) > MAX_STOPS or not all(stops):
        raise BadRequest(f"stop must be at most {MAX_STOPS} strings, none of them empty", param="stop")
    return tuple(stops)


def _chat_logprobs(body: Mapping[str, Any]) -> int | None:
    top = _number(body, "top_logprobs", int, 0, low=0, high=MAX_LOGPROBS)
    if _flag(body, "logprobs"):
        return top
    if top:
        raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    return None


def _completion_logprobs(body: Mapping[str, Any]) -> int | None:
    if body.get("logprobs") is None:
        return None
    return _number(body, "logprobs", int, 0, low=0, high=MAX_LOGPROBS)
