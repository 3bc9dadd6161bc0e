"""An OpenAI request, read once: its items in order, what it will cost, and nothing in it that a client must not say.

Unknown fields and the order of keys survive. Media are hashed here and never decoded; URLs are never fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from blake3 import blake3

from proxy.core import Api, Body, Item, Job, field_lines, model_of
from proxy.errors import BadRequest, ForbiddenField
from proxy.intake.limits import Limits
from proxy.media import splice
from proxy.media.costs import Costs, price_of
from proxy.media.splice import Cut, Media, Pieces
from proxy.media.text import BYTES_PER_TOKEN
from proxy.media.vision import Vision

T = TypeVar("T")

# Part kinds with their modality; a part without `type` is known by the key it has, as vLLM does.
_MEDIA = {"image_url": "image", "video_url": "video", "audio_url": "audio", "input_audio": "audio"}
_RESERVED = ("kv_transfer_params", "ec_transfer_params")
_DEFAULT_OUTPUT_TOKENS = 256  # predicted for balancing, never sent
_MOST_CHOICES = 128  # that a prediction counts: OpenAI's own limit, and a number that sums cannot overflow with
_LONGEST_NAME = 1024  # characters of a model's, which stays in receipts and logs


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose media this is. A salt keeps one tenant from learning by timing what another has sent."""

    salt: bytes = b""
    trust_client: bool = False  # keep client uuids, accept *_embeds and transfer parameters


_PLAIN = Costs()
_LIMITS = Limits()


def parse(
    raw: bytes | bytearray,
    api: Api,
    request_id: str,
    identity: Identity,
    headers: Mapping[str, str] | None = None,
    costs: Costs = _PLAIN,
    limits: Limits = _LIMITS,
) -> Job:
    """The job in a request's bytes, which its body goes on to use. Raises BadRequest.

    Takes a fraction of a millisecond per megabyte of media; large bodies belong in a thread.
    """
    read, cuts = _load(raw, splice.loads)
    body = _object(read)
    limits.check_depth(body)
    reading = _Reading(identity, cuts, costs, limits)
    try:
        items = reading.items(body, api)
    except BadRequest:
        if not cuts:
            raise
        items = None
    if items is None or not reading.complete:  # something stands where media do not: read it all as plain JSON
        body = _object(_load(raw, orjson.loads))
        items = _Reading(identity, [], costs, limits).items(body, api)
    text_bytes, token_ids = _text(body)
    limits.check_text(text_bytes)
    return Job(
        id=request_id,
        api=api,
        body=body,
        items=items,
        text_tokens=token_ids or costs.text.tokens(model_of(body), text_bytes),
        output_tokens=_output_tokens(body),
        stream=body.get("stream") is True,
        headers=headers or {},
        fields=field_lines(headers or {}),
        nbytes=len(raw),
        raw=raw,
        text_bytes=0 if token_ids else text_bytes,
    )


def encoded(body: Body, job: Job) -> bytes | bytearray | Pieces:
    """`body` as bytes for an engine, whole or in pieces: the client's own where a dialect changed nothing."""
    return job.raw if body is job.body and job.raw else splice.dumps(body)


def _load(raw: bytes | bytearray, load: Callable[[bytes | bytearray], T]) -> T:
    """What `load` makes of `raw`. Raises BadRequest."""
    try:
        return load(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None


def _object(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    if not isinstance(body.get("stream", False), bool | None):
        raise BadRequest("`stream` must be true or false", param="stream")
    if len(model_of(body)) > _LONGEST_NAME:
        raise BadRequest(f"`model` has more than {_LONGEST_NAME} characters", param="model")
    return body


def _check_reserved(body: Body, trusted: bool) -> None:
    for name, value in body.items():
        if name not in _RESERVED and not name.endswith("_embeds"):
            continue
        if not trusted:
            raise ForbiddenField(f"`{name}` is set by the proxy and not accepted from clients", param=name)
        if name in _RESERVED and not isinstance(value, dict | None):
            raise BadRequest(f"`{name}` must be an object", param=name)


def parts(body: Body) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(message index, part index, part) of each content part that is an object, in reading order."""
    messages = body.get("messages")
    for m, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for p, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict):
                yield m, p, part


def _kind(part: Mapping[str, Any]) -> str | None:
    named = part.get("type")
    if named is not None:
        return named if isinstance(named, str) and named in _MEDIA else None
    return next((key for key in _MEDIA if key in part), None)


class _Reading:
    """Items out of one parsed body. Strings that were cut out of it become `splice.Cut`s in their place."""

    def __init__(self, identity: Identity, cuts: list[memoryview], costs: Costs, limits: Limits) -> None:
        self._identity = identity
        self._cuts = cuts
        self._costs = costs
        self._limits = limits
        self._used: set[int] = set()
        self._salt = b""

    @property
    def complete(self) -> bool:
        """Every cut was found."""
        return len(self._used) == len(self._cuts)

    def items(self, body: dict[str, Any], api: Api) -> tuple[Item, ...]:
        """Raises BadRequest."""
        _check_reserved(body, self._identity.trust_client)
        self._salt = salt(body, self._identity)
        items = tuple(self._items(body)) if api is Api.CHAT else ()
        if api is Api.CHAT and not isinstance(body.get("messages"), list):
            raise BadRequest("`messages` must be a list", param="messages")
        if api is Api.COMPLETIONS and "prompt" not in body and "prompt_embeds" not in body:
            raise BadRequest("`prompt` is missing", param="prompt")
        return items

    def _items(self, body: Body) -> Iterator[Item]:
        index = 0
        vision: Vision | None = None
        for m, p, part in parts(body):
            if not self._identity.trust_client:
                _refuse_embeds(part, f"messages[{m}].content[{p}]")
            kind = _kind(part)
            self._limits.check_urls(part, kind, f"messages[{m}].content[{p}]")
            if kind is not None:
                vision = vision or self._costs.vision(body)
                self._limits.check_items(index + 1)
                yield self._item(index, m, p, part, kind, vision)
                index += 1

    def _item(self, index: int, m: int, p: int, part: dict[str, Any], kind: str, vision: Vision) -> Item:
        modality = _MEDIA[kind]
        url = _url(part.get(kind), kind, f"messages[{m}].content[{p}]")
        found = self._media(part, kind, url)
        content = {**part, "type": kind}
        if self._identity.trust_client and isinstance(part.get("uuid"), str):
            mm_hash: str | None = part["uuid"]
        else:
            mm_hash = None if found is None else found.mm_hash
            content.pop("uuid", None)
            if mm_hash is not None:
                content["uuid"] = mm_hash
        same = mm_hash or url
        size = self._costs.size(modality, found, same)
        self._limits.check_size(size, f"messages[{m}].content[{p}]")
        tokens, work = price_of(vision, size)
        return Item(index, m, p, modality, content, mm_hash, same, tokens, work, tokens * vision.embedding_bytes)

    def _media(self, part: dict[str, Any], kind: str, url: str) -> Media | None:
        """What the media are, or None if they are not here."""
        if not self._cuts or (hit := splice.find(url, self._cuts)) is None:
            return _digest(url, kind, self._salt)
        number, prefix = hit
        if number in self._used or (kind != "input_audio" and not _names_base64(prefix)):
            return None
        found = splice.digest(self._cuts[number], self._salt)
        if found is not None:
            self._used.add(number)
            cut, value = Cut(prefix, self._cuts[number]), part[kind]
            part[kind] = {**value, _field(kind): cut} if isinstance(value, dict) else cut
        return found


def _refuse_embeds(part: Mapping[str, Any], param: str) -> None:
    names = [*part, part.get("type")]
    name = next((name for name in names if isinstance(name, str) and name.endswith("_embeds")), None)
    if name is not None:
        raise ForbiddenField(f"`{name}` is set by the proxy and not accepted from clients", param=param)


def _url(value: Any, kind: str, param: str) -> str:
    """The media's URL, or its base64 text for `input_audio`. A null value would name media by a client's uuid alone."""
    field = _field(kind)
    url = value.get(field) if isinstance(value, dict) else value
    if not isinstance(url, str) or not url:
        raise BadRequest(f"`{kind}` must hold the media: a URL, or an object with `{field}`", param=param)
    return url


def _field(kind: str) -> str:
    return "data" if kind == "input_audio" else "url"


def _digest(url: str, kind: str, salt: bytes) -> Media | None:
    """What the media are, or None if they are not here.

    Only strict base64 is hashed here: where a decoder could read the same text in two ways, the encoder's own reading
    must decide the hash, or one image could be cached under another's name.
    """
    if kind == "input_audio":
        return splice.digest(url, salt)
    head, comma, payload = url.partition(",")
    return splice.digest(payload, salt) if comma and _names_base64(head + comma) else None


def _names_base64(prefix: str) -> bool:
    """Whether `prefix` is a data URL up to its comma, and base64 follows."""
    return prefix[:5].lower() == "data:" and prefix.find(",") == len(prefix) - 1 and prefix.lower().endswith(";base64,")


def salt(body: Body, identity: Identity) -> bytes:
    """A BLAKE3 key from all that changes the embedding besides the media; empty where nothing does.

    Without it, one client's `mm_processor_kwargs` would decide what another gets for the same image.
    """
    factors = [body.get(name) for name in ("mm_processor_kwargs", "media_io_kwargs")]
    if not identity.salt and not any(factors):
        return b""
    material = identity.salt + b"\0" + orjson.dumps(factors, option=orjson.OPT_SORT_KEYS)
    return blake3(material, derive_key_context="triptych mm_hash v1").digest()


def _text(body: Body) -> tuple[int, int]:
    """(bytes of text in UTF-8, tokens that are told as ids, with what text stands beside them)."""
    size, messages = 0, body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            size += _size(content)
    size += sum(_size(part["text"]) for _, _, part in parts(body) if isinstance(part.get("text"), str))
    if body.get("tools"):
        size += len(orjson.dumps(body["tools"]))
    prompt = body.get("prompt")
    if prompt is None:
        return size, 0
    more, ids = _prompt(prompt)
    size += more
    return size, ids + size // BYTES_PER_TOKEN if ids else 0


def _prompt(prompt: Any) -> tuple[int, int]:
    """(bytes of text, token ids) in a text, a list of token ids, or a list of either."""
    if isinstance(prompt, str):
        return _size(prompt), 0
    if not isinstance(prompt, Sequence):
        return 0, 0
    others = [_prompt(entry) for entry in prompt if not isinstance(entry, int)]
    return sum(size for size, _ in others), len(prompt) - len(others) + sum(ids for _, ids in others)


def _size(text: str) -> int:
    """Bytes in UTF-8: a CJK character is three of them and about one token, which fits the four bytes of a token."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def _output_tokens(body: Body) -> int:
    asked = body.get("max_completion_tokens") or body.get("max_tokens")
    choices = body.get("n")
    per_choice = min(asked, _DEFAULT_OUTPUT_TOKENS) if isinstance(asked, int) and asked > 0 else _DEFAULT_OUTPUT_TOKENS
    return per_choice * (min(choices, _MOST_CHOICES) if isinstance(choices, int) and choices > 0 else 1)
