from collections.abc import Iterator

import pytest

from bench.fuzzing.peers import Connected
from proxy import openai
from proxy.http.client import Exchange

HEAD = b"Host: a\r\nContent-Length: 15\r\n\r\n"
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\n" + HEAD + b'{"messages":[]}'


@pytest.fixture
def peers() -> Iterator[Connected]:
    found = Connected()
    yield found
    found.close()


@pytest.mark.parametrize(
    ("chunks", "well"),
    [
        ([CHAT], True),
        ([CHAT[:20], CHAT[20:80], b"", CHAT[80:], CHAT], True),
        ([b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 200], True),
        ([b"GET /nowhere HTTP/1.1\r\nHost: a\r\n\r\n"], False),
        ([CHAT[:-1]], False),
        ([b"\0"], False),
        ([], False),
    ],
)
def test_requests_are_served(peers: Connected, chunks: list[bytes], well: bool) -> None:
    assert peers.served(chunks) is well


def test_a_500_is_a_finding(peers: Connected, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError

    monkeypatch.setattr(openai, "parse", broken)
    with pytest.raises(AssertionError, match="500"):
        peers.served([CHAT])


def test_what_a_callback_raises_is_a_finding(peers: Connected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Exchange, "got", lambda self, data: 1 / 0)
    with pytest.raises(AssertionError, match="callback error"):
        peers.answered([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", b"ok"])


@pytest.mark.parametrize(
    ("chunks", "well"),
    [
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"], True),
        ([b"HTTP/1.1 200 OK\r\n", b"\r\nuntil the end"], True),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok"], False),
        ([b"<html>"], False),
        ([], False),
    ],
)
def test_answers_are_read(peers: Connected, chunks: list[bytes], well: bool) -> None:
    assert peers.answered(chunks) is well
    assert peers.answered([b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"])
