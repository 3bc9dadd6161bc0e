"""Profilers of a fleet, by one call to the proxy."""

from __future__ import annotations

import pytest

from tests.fakes.deployment import deployment
from tests.fakes.vllm import World


@pytest.mark.parametrize("path", ["/start_profile", "/stop_profile"])
async def test_every_engine_is_told_and_one_without_a_profiler_is_no_failure(path: str) -> None:
    async with deployment("1e1p1d", "auto", World().engines(), forward_authorization=True) as d:
        d.prefills[0].profiles = False
        answer = await d.post(b"", path, authorization="Bearer engines")
        assert answer.status == 200, answer.body
        statuses = {d.encoders[0].url: 200, d.prefills[0].url: 404, d.decodes[0].url: 200}
        assert answer.json == {"engines": statuses}
        assert [engine.profiled for engine in d.engines] == [[(path, "Bearer engines")], [], [(path, "Bearer engines")]]


async def test_none_that_can_is_told_as_such() -> None:
    async with deployment("1b") as d:
        answer = await d.post(b"", "/start_profile")
        assert (answer.status, answer.error["code"], answer.error["retryable"]) == (503, "no_instance", False)


async def test_one_that_fails_is_told() -> None:
    async with deployment("2b", "auto", World().engines()) as d:
        await d.combined[0].stop()
        answer = await d.post(b"", "/start_profile")
        assert (answer.status, answer.error["code"]) == (502, "engine_unreachable")
        assert len(d.combined[1].profiled) == 1, "the other is told all the same"


async def test_the_admin_key_is_asked_for_and_kept_from_engines() -> None:
    async with deployment("1b", "auto", World().engines(), admin_key="k", forward_authorization=True) as d:
        assert (await d.post(b"", "/start_profile")).status == 401
        assert (await d.post(b"", "/start_profile", authorization="Bearer k")).status == 200
        assert (await d.post(b"", "/start_profile", x_api_key="k", authorization="Bearer engines")).status == 200
        assert [given for _, given in d.combined[0].profiled] == [None, "Bearer engines"]
