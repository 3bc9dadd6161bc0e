"""What a client's messages become on the way to tokens: the shape a chat template reads, and the places of the
images. Pure; no tokenizer, no tensors.

A client's strings can hold the very tokens that mark media (`<|image_pad|>`). `Guard` hides them while the template
is rendered, so that the only media tokens in the rendered text are the template's own.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.language.sequence import Item

IMAGE_PARTS = frozenset({"image", "image_url", "image_embeds", "input_image"})
TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal"})


class PromptError(ValueError):
    """The messages cannot become a prompt; `param` is the path in the body of what is wrong, where one is known."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class Media:
    """A media part of the messages. `grid` is (t, h, w) in patches, before the spatial merge."""

    mm_hash: str
    modality: str
    grid: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens ready to run: every item's placeholder stands as often as the item has tokens. The last `generated` of
    them are the beginning of an answer."""

    token_ids: list[int]
    items: tuple[Item, ...]
    generated: int = 0


def count_images(messages: Sequence[Mapping[str, Any]]) -> int:
    """Image parts in messages that `readable` returned."""
    contents = (message.get("content") for message in messages)
    return sum(part["type"] == "image" for content in contents if isinstance(content, list) for part in content)


def readable(message: Mapping[str, Any], param: str) -> dict[str, Any]:
    """A message as templates expect it: parts are text or image, content is never null, tool arguments are objects.

    :raises PromptError: the message or one of its parts is of another kind.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise PromptError("a message is an object with a role", param)
    content = message.get("content")
    shown = dict(message)
    if content is None or isinstance(content, str):
        shown["content"] = content or ""
    elif isinstance(content, list):
        shown["content"] = [readable_part(part, f"{param}.content[{n}]") for n, part in enumerate(content)]
    else:
        raise PromptError("content is a string or a list of parts", f"{param}.content")
    if isinstance(calls := message.get("tool_calls"), list):
        shown["tool_calls"] = [readable_call(call) for call in calls]
    return shown


def readable_part(part: Any, param: str) -> dict[str, Any]:
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if kind in IMAGE_PARTS:
        return {"type": "image"}
    if kind in TEXT_PARTS:
        text = part.get("text", part.get("refusal"))
        if not isinstance(text, str):
            raise PromptError("a text part needs its text", param)
        return {"type": "text", "text": text}
    raise PromptError(f"content parts of type {kind!r} are not served; use text or image_url", param)


def readable_call(call: Any) -> Any:
    """Templates write a call's arguments as JSON themselves; OpenAI sends them as a string of JSON."""
    if not isinstance(call, Mapping) or not isinstance(function := call.get("function"), Mapping):
        return call
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return call  # a model may have written broken JSON; its own words go back to it unchanged
    return {**call, "function": {**function, "arguments": parsed}}


def expand(
    token_ids: Sequence[int], placeholder: int, media: Sequence[Media], merge_size: int, around: Sequence[int] = ()
) -> Prompt:
    """Repeat the k-th placeholder as often as the k-th media part has tokens, between the two tokens `around` it.

    :raises PromptError: the placeholders are not as many as the parts, or a grid is not made of whole merged patches.
    """
    if (found := token_ids.count(placeholder)) != len(media):
        raise PromptError(
            f"the rendered prompt has {found} image placeholders for {len(media)} images: "
            "the chat template left an image out, or text parts spell a placeholder together",
            "messages",
        )
    ids: list[int] = []
    items: list[Item] = []
    begin = 0
    for part in media:
        end = token_ids.index(placeholder, begin)
        ids += [*token_ids[begin:end], *around[:1]]
        count = num_tokens(part.grid, merge_size)
        items.append(Item(part.mm_hash, part.modality, part.grid, len(ids), count))
        ids += [placeholder] * count + [*around[1:]]
        begin = end + 1
    ids += token_ids[begin:]
    return Prompt(ids, tuple(items))


def num_tokens(grid: tuple[int, int, int], merge_size: int) -> int:
    """How many tokens an image takes: t · h · w / merge².

    :raises PromptError: the grid is empty or not made of whole merged patches.
    """
    t, h, w = grid
    if min(grid) < 1 or h % merge_size or w % merge_size:
        raise PromptError(f"image_grid_thw {list(grid)} is not made of whole {merge_size}×{merge_size} patches")
    return t * (h // merge_size) * (w // merge_size)


class Guard:
    """Hides literals in a client's strings behind marks that nobody can guess, and finds them in the rendered text."""

    def __init__(self, literals: Sequence[str]) -> None:
        nonce = secrets.token_hex(16)
        self._marks = {literal: f"literal{nonce}x{n}x" for n, literal in enumerate(literals)}
        self._literals = {mark: literal for literal, mark in self._marks.items()}
        self._pattern = re.compile("|".join(self._literals))

    def hide(self, value: Any) -> Any:
        """The same JSON value with every string guarded, keys too."""
        if isinstance(value, str):
            return self._hide_text(value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(inner) for inner in value]
        return value

    def _hide_text(self, text: str) -> str:
        if "<" in text:
            for literal, mark in self._marks.items():
                text = text.replace(literal, mark)
        return text

    def split(self, text: str) -> Iterator[tuple[str, str | None]]:
        """The text between the marks, each piece with the literal that follows it; None behind the last."""
        begin = 0
        for found in self._pattern.finditer(text):
            yield text[begin : found.start()], self._literals[found[0]]
            begin = found.end()
        yield text[begin:], None
