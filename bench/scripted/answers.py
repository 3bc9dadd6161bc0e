"""What scripted engines say, and so what a client must get: every piece names its request and its place in the answer.

That makes a lost, doubled or foreign piece visible in the text. Requests are made here too, since they carry the tag.
"""

from __future__ import annotations

import base64
import random
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

CHAT = "/v1/chat/completions"
MODEL = "scripted"
_TAG = re.compile(rb"tag=(\w+)")
_BASE64 = b";base64,"


def pieces(tag: str, count: int) -> list[str]:
    """The tokens of an answer."""
    return [f" {tag}.{number}" for number in range(count)]


def text(tag: str, count: int) -> str:
    """The whole answer to the request `tag`, of `count` tokens."""
    return "".join(pieces(tag, count))


def request(tag: str, tokens: int, *, stream: bool, size: int = 0, images: Sequence[bytes] = ()) -> bytes:
    """A chat request whose body has about `size` bytes of text besides its images."""
    prompt = f"tag={tag}; Say so many tokens. ".ljust(size, "x")
    parts: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
    parts += [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    content: Any = parts if images else prompt
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": stream,
    }
    return orjson.dumps(body)


def data_url(image: bytes) -> str:
    return "data:image/png" + _BASE64.decode() + base64.b64encode(image).decode()


def image(nbytes: int, seed: int, width: int = 1024, height: int = 768) -> bytes:
    """`nbytes` that begin as a PNG does; nobody here decodes them."""
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", width, height, 8, 2, 0, 0, 0)
    return (header + random.Random(seed).randbytes(max(0, nbytes - len(header))))[:nbytes]


def parse(body: bytes) -> Mapping[str, Any]:
    """A request without its base64, which holds neither quote nor escape. `{}` where it is no JSON object."""
    try:
        parsed = orjson.loads(elided(body))
    except orjson.JSONDecodeError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def elided(body: bytes) -> bytes:
    kept: list[bytes] = []
    at = 0
    while (begin := body.find(_BASE64, at)) >= 0:
        begin += len(_BASE64)
        end = body.find(b'"', begin)
        if end < 0:
            break
        kept.append(body[at:begin])
        at = end
    return b"".join([*kept, body[at:]]) if kept else body


def tag_of(body: bytes) -> str:
    """The tag in a request's text, which stands before its images."""
    found = _TAG.search(body)
    return found[1].decode() if found else "none"


def whole(request_id: str, said: str, tokens: int) -> dict[str, Any]:
    """An unstreamed answer."""
    message = {"role": "assistant", "content": said}
    return {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens},
    }


def event(request_id: str, delta: Mapping[str, str], finish: str | None = None) -> bytes:
    """One event of a stream."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    value = {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": MODEL,
        "choices": [choice],
    }
    return b"data: " + orjson.dumps(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def events(request_id: str, tag: str, count: int) -> Iterator[bytes]:
    """A stream, one entry per token; the first also has the role, the last the end."""
    begin = event(request_id, {"role": "assistant", "content": ""})
    for number, piece in enumerate(pieces(tag, count), start=1):
        end = event(request_id, {}, "stop") + DONE if number == count else b""
        yield begin + event(request_id, {"content": piece}) + end
        begin = b""


def error(message: str, status: int) -> dict[str, Any]:
    """An error as OpenAI shapes it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
