"""Who is believed to hold which beginning of a prompt in its KV, from what was sent there. No engine is asked.

    prompt   │ text, 512 bytes │ text, 512 bytes │ text │ image │ text, 512 bytes │ the rest, in no block
    chain    └─── block 0 ─────┴──── block 1 ────┴─ 2 ──┴── 3 ──┴──── block 4 ────┘

A block's key is a hash of its content and the key before it: equal keys are equal prompts up to there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from proxy.core import Item, Job

_BLOCK = 512  # bytes of text
_LONGEST = 1024  # blocks of a chain: half a megabyte of text
_MOST = 1 << 18  # blocks of all instances together, each about 300 bytes of memory
_LEAST = 64  # of one
# What changes a prompt's tokens, or keeps engines from sharing their KV, besides the messages.
_APART = ("model", "cache_salt", "documents", "chat_template", "chat_template_kwargs", "mm_processor_kwargs")


@dataclass(frozen=True, slots=True)
class Chain:
    """A prompt as blocks: their keys, and how many tokens of the prompt end with each."""

    keys: Sequence[int]
    ends: Sequence[int]
    items: Mapping[int, int]  # the number of an item's block, by the item's index

    @classmethod
    def of(cls, job: Job) -> Chain:
        writing = _Writing(job)
        for name in ("tools", "prompt"):  # templates put tools first
            if name in job.body:
                writing.text(_flat(job.body[name]))
        items = {(item.message, item.part): item for item in job.items}
        for m, message in enumerate(job.body.get("messages") or ()):
            for piece in _pieces(m, message, items):
                if isinstance(piece, Item):
                    writing.item(piece)
                else:
                    writing.text(piece)
        return writing.chain()

    def covered(self, tokens: int) -> frozenset[int]:
        """The indices of the items that lie within the first `tokens`."""
        return frozenset(index for index, block in self.items.items() if self.ends[block] <= tokens)


class _Writing:
    """A chain that grows. Each block is (content's hash, bytes of text before its end, tokens of items before it)."""

    def __init__(self, job: Job) -> None:
        self._text_tokens = job.text_tokens
        self._key = hash(tuple(_flat(job.body[name]) for name in _APART if name in job.body))
        self._keys: list[int] = []
        self._ends: list[tuple[int, int]] = []
        self._items: dict[int, int] = {}
        self._open = b""  # text after the last block
        self._nbytes = 0
        self._tokens = 0

    def text(self, data: bytes) -> None:
        data = self._open + data
        whole = len(data) - len(data) % _BLOCK
        for start in range(0, whole, _BLOCK):
            self._nbytes += _BLOCK
            self._block(data[start : start + _BLOCK])
        self._open = data[whole:]

    def item(self, item: Item) -> None:
        if self._open:
            self._nbytes += len(self._open)
            self._block(self._open)
            self._open = b""
        self._tokens += item.tokens
        if self._block((item.modality, item.identity)):
            self._items[item.index] = len(self._keys) - 1

    def chain(self) -> Chain:
        per_byte = self._text_tokens / max(1, self._nbytes + len(self._open))
        return Chain(self._keys, [int(nbytes * per_byte) + tokens for nbytes, tokens in self._ends], self._items)

    def _block(self, content: bytes | tuple[str, str]) -> bool:
        if len(self._keys) == _LONGEST:
            return False
        self._key = hash((self._key, content))
        self._keys.append(self._key)
        self._ends.append((self._nbytes, self._tokens))
        return True


def _pieces(number: int, message: Any, items: Mapping[tuple[int, int], Item]) -> Iterator[bytes | Item]:
    """One message in the order of the prompt."""
    if not isinstance(message, dict):
        yield _flat(message)
        return
    content = message.get("content")
    yield _flat({name: value for name, value in message.items() if name != "content"})
    if not isinstance(content, list):
        yield _flat(content)
        return
    for p, part in enumerate(content):
        item = items.get((number, p))
        yield item or _flat(part["text"] if isinstance(part, dict) and "text" in part else part)


def _flat(value: Any) -> bytes:
    return value.encode("utf-8", "replace") if isinstance(value, str) else orjson.dumps(value)


class Prefixes:
    """Per instance the blocks last sent there. The longest unused goes first, and a prompt's last before its first.

    All that is kept is bounded, and shared evenly by the instances that hold anything.
    """

    def __init__(self, most: int = _MOST) -> None:
        """`most`: blocks, of all instances together."""
        self._most = most
        self._held: dict[str, OrderedDict[int, None]] = {}  # by URL, longest unused first
        self._holders: dict[int, set[str]] = {}  # by block

    def __repr__(self) -> str:
        return f"<Prefixes { ({url: len(held) for url, held in self._held.items()}) }>"

    def __len__(self) -> int:
        """Blocks of all instances."""
        return sum(map(len, self._held.values()))

    @property
    def urls(self) -> Collection[str]:
        """Who holds anything."""
        return self._held.keys()

    def matched(self, chain: Chain, least: int = 0) -> dict[str, int]:
        """By URL, how many tokens of the prompt it holds from the beginning; absent: none, or fewer than `least`."""
        known: list[set[str]] = []
        for key in chain.keys:
            if (holders := self._holders.get(key)) is None:
                break
            known.append(holders)
        found: dict[str, int] = {}
        for number in range(len(known) - 1, -1, -1):
            if chain.ends[number] < least:
                break
            if len(known[number]) > len(found):  # who holds a block holds those before it, and was used last there
                for url in known[number] - found.keys():
                    found[url] = chain.ends[number]
        return found

    def placed(self, url: str, chain: Chain) -> None:
        """A request with this prompt was sent to `url`."""
        held = self._held.setdefault(url, OrderedDict())
        for key in reversed(chain.keys):
            if key in held:
                held.move_to_end(key)
            else:
                held[key] = None
                self._holders.setdefault(key, set()).add(url)
        share = max(_LEAST, self._most // len(self._held))
        while len(held) > share:
            self._dropped(url, held.popitem(last=False)[0])
        if not held:
            del self._held[url]

    def forget(self, url: str) -> None:
        """`url` has left the fleet, or is another process. Unknown ones are ignored."""
        for key in self._held.pop(url, ()):
            self._dropped(url, key)

    def _dropped(self, url: str, key: int) -> None:
        holders = self._holders[key]
        holders.discard(url)
        if not holders:
            del self._holders[key]
