from __future__ import annotations

import asyncio

import pytest

from engines.language.stream import Stream, Token


def make() -> tuple[Stream, list[object]]:
    calls: list[object] = []
    return Stream(abort=lambda: calls.append("abort"), stop=calls.append), calls


async def test_tokens_come_together_and_the_end_after_them() -> None:
    stream, _ = make()
    stream.on_token(Token(0, 1))
    stream.on_token(Token(0, 2))
    assert await anext(stream) == [Token(0, 1), Token(0, 2)]
    stream.on_token(Token(0, 3, finish_reason="stop"))
    stream.on_end()
    assert [token async for tokens in stream for token in tokens] == [Token(0, 3, finish_reason="stop")]


async def test_an_error_comes_after_the_tokens_before_it() -> None:
    stream, _ = make()
    stream.on_token(Token(0, 1))
    stream.on_end(ValueError("broken"))
    assert await anext(stream) == [Token(0, 1)]
    with pytest.raises(ValueError, match="broken"):
        await anext(stream)


async def test_admitted_waits_for_blocks_or_an_error() -> None:
    stream, _ = make()
    async with asyncio.TaskGroup() as group:
        waiter = group.create_task(stream.admitted())
        await asyncio.sleep(0)
        stream.on_blocks((3, 4))
    assert waiter.result() == (3, 4)
    stream, _ = make()
    stream.on_end(ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        await stream.admitted()


async def test_close_aborts_once_and_not_after_the_end() -> None:
    stream, calls = make()
    stream.stop(2)
    stream.close()
    stream.close()
    assert calls == [2, "abort"]
    stream, calls = make()
    stream.on_end()
    stream.close()
    assert calls == []
