"""What commands are told by a proxy, and why by something else they are not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deploy.asking import NoAnswer, told
from tests.support.answering import answering


@contextmanager
def server(status: int, body: bytes, path: str) -> Iterator[str]:
    """Answers so, once somebody has asked for `path` and nothing else."""
    with answering(status, body) as (url, asked):
        yield url
    assert asked == [path]


@pytest.mark.parametrize("slash", ["", "/"])
def test_an_object_is_told(slash: str) -> None:
    with server(200, b'{"x": 1, "y": 2}', "/there?n=3") as url:
        assert told(url + slash, "/there?n=3", has="y") == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (200, b'{"x": 1}', "is not a proxy of Triptych"),
        (200, b"[]", "is not a proxy of Triptych"),
        (200, b"<html>", "Expecting value"),
        (401, b'{"error": {"message": "this needs the admin key"}}', "answered 401: this needs the admin key"),
        (404, b"nothing here", "answered 404: Not Found"),
        (500, b'{"error": 1}', "answered 500: Internal Server Error"),
    ],
)
def test_whatever_else_is_there_is_named(status: int, body: bytes, why: str) -> None:
    with server(status, body, "/there") as url, pytest.raises(NoAnswer) as error:
        told(url, "/there", has="y")
    assert str(error.value).startswith(f"{url}/there") and why in str(error.value)


@pytest.mark.parametrize(("url", "why"), [("http://127.0.0.1:9", "refused"), ("proxy:8000", "unknown url type")])
def test_who_cannot_be_reached_is_named(url: str, why: str) -> None:
    with pytest.raises(NoAnswer, match=why):
        told(url, "/there", has="y")
