"""Small damage to bytes: the inputs between those that a grammar makes. Knows words of JSON, HTTP, events and media."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

_WORDS = (
    *(
        b"null",
        b"true",
        b"[]",
        b"{}",
        b'""',
        b"0",
        b"-1",
        b"1e999",
        b"1.5",
        b"9223372036854775808",
        b'"\\ud800"',
        b"NaN",
    ),
    *(b"[" * 300, b"{" + b'"a":{' * 300, b"]", b"}", b",", b":", b'"', b"\\", b"\\u0000", b"[null]", b'[{"a":1}]'),
    *(b"\r\n", b"\n\n", b"\r", b"\n", b"\0", b" ", b"\t", b"\r\n\r\n", b"0\r\n\r\n", b"\xff", b"\xef\xbb\xbf", b"\xc3"),
    *(
        b"data: ",
        b"data: [DONE]\n\n",
        b'"error"',
        b'"choices":',
        b'"uuid":',
        b"_embeds",
        b";base64,",
        b"data:,",
        b"%00",
    ),
    *(
        b"Content-Length: 5\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Expect: 100-continue\r\n",
        b"HTTP/1.0",
        b"HTTP/9.9",
    ),
    *(
        b"http://0x7f.1/",
        b"file:///etc/passwd",
        b"http://[::1]/",
        b"//",
        b"@",
        b"\x00\x00\x00\x00",
        b"\xff\xff\xff\xff",
    ),
)
_VALUE = re.compile(rb'"(?:[^"\\]|\\.){0,64}"|-?\d[\d.eE+-]*|true|false|null|\[\]|\{\}')
_NUMBER = re.compile(rb"\d+")

Change = Callable[[bytes, Random], bytes]


def mutated(data: bytes, dice: Random) -> bytes:
    """`data` after one to four changes; sometimes none of them shows."""
    for _ in range(dice.choice((1, 1, 1, 2, 2, 4))):
        data = dice.choice(_CHANGES)(data, dice)
    return data


def _at(data: bytes, dice: Random) -> int:
    return int(dice.random() * (len(data) + 1))


def _flip(data: bytes, dice: Random) -> bytes:
    at = _at(data, dice)
    return data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :] if at < len(data) else data


def _cut(data: bytes, dice: Random) -> bytes:
    a, b = sorted((_at(data, dice), _at(data, dice)))
    return data[:a] + data[min(b, a + 64) :]


def _truncate(data: bytes, dice: Random) -> bytes:
    return data[: _at(data, dice)]


def _repeat(data: bytes, dice: Random) -> bytes:
    a, b = sorted((_at(data, dice), _at(data, dice)))
    return data[:b] + data[a : min(b, a + 256)] * dice.choice((1, 2, 50)) + data[b:]


def _insert(data: bytes, dice: Random) -> bytes:
    at = _at(data, dice)
    return data[:at] + dice.choice(_WORDS) + data[at:]


def _overwrite(data: bytes, dice: Random) -> bytes:
    at, word = _at(data, dice), dice.choice(_WORDS)
    return data[:at] + word + data[at + len(word) :]


def _instead(data: bytes, dice: Random) -> bytes:
    """Another word for a whole value of JSON: what stays JSON gets further than what does not."""
    found = _VALUE.search(data, _at(data, dice)) or _VALUE.search(data)
    return data if found is None else data[: found.start()] + dice.choice(_WORDS[:12]) + data[found.end() :]


def _number(data: bytes, dice: Random) -> bytes:
    found = _NUMBER.search(data, _at(data, dice))
    if found is None:
        return data
    value = int(found[0][:18]) + dice.choice((-1, 1, 1 << 16, 1 << 31, 1 << 63, -(1 << 40)))
    return data[: found.start()] + str(value).encode() + data[found.end() :]


_CHANGES: tuple[Change, ...] = (
    *(_flip, _cut, _truncate, _repeat, _insert, _overwrite, _instead, _instead, _instead, _number),
)
