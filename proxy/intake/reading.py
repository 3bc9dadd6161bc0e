"""From a request's bytes to a job with its price: parsed here or in a thread, its URLs fetched or measured."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from proxy import openai
from proxy.core import Api, Job
from proxy.intake.limits import Limits
from proxy.media.costs import Costs
from proxy.media.inlining import Inlining
from proxy.media.measuring import Measuring
from proxy.openai import Identity

_LARGE = 1 << 18  # bytes; parsing and hashing more than this takes a millisecond and leaves the loop


class Reading:
    """`async with running()` around its use."""

    def __init__(
        self, costs: Costs, limits: Limits, measuring: Measuring | None = None, inlining: Inlining | None = None
    ) -> None:
        """`measuring`: None asks nobody for the size of media behind URLs; `inlining`: None leaves them there."""
        self._costs = costs
        self._limits = limits
        self._measuring = measuring
        self._inlining = inlining

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for one in (self._measuring, self._inlining):
                if one is not None:
                    await stack.enter_async_context(one.running())
            yield

    def go_by(self, limits: Limits) -> None:
        """Other limits from now on."""
        self._limits = limits
        for one in (self._measuring, self._inlining):
            if one is not None and limits.rules is not None:
                one.go_by(limits.rules)

    async def job(
        self, raw: bytes | bytearray, api: Api, name: str, identity: Identity, passed: Mapping[str, str]
    ) -> Job:
        """`name`: what engines know it by; `passed`: the headers that they get. Raises BadRequest."""
        limits = self._limits
        arguments = (raw, api, name, identity, passed, self._costs, limits)
        job = await asyncio.to_thread(openai.parse, *arguments) if len(raw) > _LARGE else openai.parse(*arguments)
        if job.items and self._inlining is not None:
            job = await self._inlining.inlined(job, identity, self._costs, limits)
        if job.items and self._measuring is not None:
            job = await self._measuring.measured(job)
        return job
