"""What a client's messages become on the way to tokens: the shape a chat template reads, and the places of the
images and videos. Pure; no tokenizer, no tensors.

    rendered   … <|vision_start|><|video_pad|><|vision_end|> …
    laid out   … <|vision_start|><0.3 seconds><|vision_start|><|video_pad|><|vision_end|><1.3 seconds>… …    `lay_out`
    expanded   the same as tokens, each pad as often as its piece has embeddings                             `expand`

A client's strings can hold the very tokens that mark media (`<|image_pad|>`). `Guard` hides them while the template
is rendered, so that the only media tokens in the rendered text are the template's own.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.families import Family
from engines.language.sequence import Item

MODALITIES = ("image", "video")
MEDIA_PARTS = {
    **dict.fromkeys(("image", "image_url", "image_embeds", "input_image"), "image"),
    **dict.fromkeys(("video", "video_url", "video_embeds", "input_video"), "video"),
}
TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal"})
MOST_TOKENS = 1 << 24  # of all media of a prompt: beyond any context, and not worth the memory to say so later


class PromptError(ValueError):
    """The messages cannot become a prompt; `param` is the path in the body of what is wrong, where one is known."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class Media:
    """A media part of the messages. `grid` is (t, h, w) in patches, before the spatial merge. Of a video `seconds` says
    when each of its t steps is, and `spacing` how many seconds they are apart; empty and 0: not told."""

    mm_hash: str
    modality: str
    grid: tuple[int, int, int]
    seconds: tuple[float, ...] = ()
    spacing: float = 0.0


@dataclass(frozen=True, slots=True)
class Piece:
    """What stands for an item at one place of the prompt: `grid` of its own, from its embedding's step `step` on."""

    media: Media
    grid: tuple[int, int, int]
    step: int = 0


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens ready to run: every item's placeholder stands as often as the item has tokens."""

    token_ids: list[int]
    items: tuple[Item, ...]


def modalities(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of the media parts in messages that `readable` returned, in order."""
    contents = (message.get("content") for message in messages)
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return [part["type"] for part in parts if part["type"] in MODALITIES]


def readable(message: Mapping[str, Any], param: str) -> dict[str, Any]:
    """A message as templates expect it: parts are text, image or video, content is never null, tool arguments are
    objects.

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
    if kind in MEDIA_PARTS:
        return {"type": MEDIA_PARTS[kind]}
    if kind in TEXT_PARTS:
        text = part.get("text", part.get("refusal"))
        if not isinstance(text, str):
            raise PromptError("a text part needs its text", param)
        return {"type": "text", "text": text}
    raise PromptError(f"content parts of type {kind!r} are not served; use text, image_url or video_url", param)


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


def lay_out(text: str, media: Sequence[Media], family: Family) -> tuple[str, list[Piece]]:
    """The rendered text with what each placeholder becomes in its place, and what stands at its pads, in order.

    :raises PromptError: the placeholders are not those of `media`, or a video does not tell its times.
    """
    found = list(re.finditer("|".join(map(re.escape, family.placeholders)), text))
    if [MODALITIES[family.placeholders.index(place[0])] for place in found] != [part.modality for part in media]:
        raise PromptError(
            f"the rendered prompt has {len(found)} placeholders for {len(media)} images and videos, or not for these: "
            "the chat template left one out, or text parts spell a placeholder together",
            "messages",
        )
    written: list[str] = []
    pieces: list[Piece] = []
    begin = 0
    for place, part in zip(found, media, strict=True):
        form, shown = _shown(part, place[0], family)
        written += [text[begin : place.start()], form]
        pieces += shown
        begin = place.end()
    return "".join([*written, text[begin:]]), pieces


def _shown(media: Media, placeholder: str, family: Family) -> tuple[str, list[Piece]]:
    if media.modality == "image" or family.step is None:
        return family.image if media.modality == "image" else placeholder, [Piece(media, media.grid)]
    steps, h, w = media.grid
    if len(media.seconds) != steps:
        raise PromptError(f"{len(media.seconds)} timestamps for a video of {steps} steps", "messages")
    forms = (family.step.format(number=n + 1, seconds=seconds) for n, seconds in enumerate(media.seconds))
    return family.between.join(forms), [Piece(media, (1, h, w), step) for step in range(steps)]


def expand(
    token_ids: Sequence[int], pads: Collection[int], pieces: Sequence[Piece], merge_size: int, rate: float = 0.0
) -> Prompt:
    """Repeat the k-th of the `pads` as often as the k-th piece has embeddings. `rate`: positions in a second of video;
    0: its steps are one position apart.

    :raises PromptError: the pads are not as many as the pieces, a grid is not made of whole merged patches, or they
        make more than MOST_TOKENS.
    """
    places = [index for index, token in enumerate(token_ids) if token in pads]
    if len(places) != len(pieces):
        raise PromptError(f"the prompt has {len(places)} placeholder tokens for {len(pieces)} pieces", "messages")
    if (count := sum(num_tokens(piece.grid, merge_size) for piece in pieces)) > MOST_TOKENS:
        raise PromptError(f"images and videos of {count} tokens fit into no context", "messages")
    ids: list[int] = []
    items: list[Item] = []
    begin = 0
    for place, piece in zip(places, pieces, strict=True):
        ids += token_ids[begin:place]
        items.append(_item(piece, len(ids), merge_size, rate))
        ids += [token_ids[place]] * items[-1].num_tokens
        begin = place + 1
    return Prompt([*ids, *token_ids[begin:]], tuple(items))


def _item(piece: Piece, offset: int, merge_size: int, rate: float) -> Item:
    media = piece.media
    interval = 1.0
    if rate and media.modality == "video":
        if media.spacing <= 0:
            raise PromptError("second_per_grid_ts of a video must be told", "messages")
        interval = rate * media.spacing
    count, rows = num_tokens(piece.grid, merge_size), num_tokens(media.grid, merge_size)
    row = piece.step * count
    return Item(media.mm_hash, media.modality, piece.grid, offset, count, row, rows, interval)


def num_tokens(grid: tuple[int, int, int], merge_size: int) -> int:
    """How many tokens an item takes: t · h · w / merge².

    :raises PromptError: the grid is empty or not made of whole merged patches.
    """
    t, h, w = grid
    if min(grid) < 1 or h % merge_size or w % merge_size:
        raise PromptError(f"the grid {list(grid)} is not made of whole {merge_size}×{merge_size} patches")
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
