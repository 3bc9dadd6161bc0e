"""From a request's bytes to a job with its price: parsed here or in a thread, its URLs measured where that is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from proxy import openai
from proxy.core import Api, Job
from proxy.costs import Costs
from proxy.measuring import Measuring
from proxy.openai import Identity

_LARGE = 1 << 18  # bytes; parsing and hashing more than this takes a millisecond and leaves the loop


class Reading:
    def __init__(self, costs: Costs, measuring: Measuring | None = None) -> None:
        """`measuring`: None asks nobody for the size of media behind URLs."""
        self._costs = costs
        self._measuring = measuring

    async def job(
        self, raw: bytes | bytearray, api: Api, name: str, identity: Identity, passed: Mapping[str, str]
    ) -> Job:
        """`name`: what engines know it by; `passed`: the headers that they get. Raises BadRequest, ForbiddenField."""
        arguments = (raw, api, name, identity, passed, self._costs)
        job = await asyncio.to_thread(openai.parse, *arguments) if len(raw) > _LARGE else openai.parse(*arguments)
        return job if self._measuring is None or not job.items else await self._measuring.measured(job)
