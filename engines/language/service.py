"""Runs one parsed request: embeddings in, KV where it belongs, tokens out. It puts the parts in order, without HTTP.

wait for room ▸ fetch embeddings (where prefill is ours) ▸ open the leg that the plan names ▸ tokens

A prompt is prefilled as far as its embeddings are here: some may still be computed by their encoder.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count

from engines.errors import BadRequest, DeadlineExceeded, Overloaded
from engines.language.descriptors import Ask, Fetch, Plan
from engines.language.embedding_rows import Embeddings
from engines.language.embeddings import EmbeddingReceiver
from engines.language.engine import LanguageEngine
from engines.language.handoff import Handoffs, Job, Leg
from engines.language.metrics import Metrics
from engines.language.positions import Positions
from engines.language.requests import Generation
from engines.language.sequence import Sequence

SOON = 0.01
"""Seconds in which an embedding comes that is there already: a step over the text before it would not pay."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the model and the flags of the same name say."""

    merge_size: int
    mrope: bool
    max_queue: int
    request_timeout: float


class Service:
    """All requests of one engine. Loop only."""

    def __init__(
        self,
        engine: LanguageEngine,
        handoffs: Handoffs,
        receiver: EmbeddingReceiver,
        metrics: Metrics,
        rules: Rules,
    ) -> None:
        self._engine = engine
        self._handoffs = handoffs
        self._receiver = receiver
        self._metrics = metrics
        self._rules = rules
        self._numbers = count()

    @asynccontextmanager
    async def run(self, generation: Generation, plan: Plan, request_id: str) -> AsyncIterator[Leg]:
        """A running request. Whatever ends the block ends the request too. Raises EngineError, here or at its end."""
        if self._engine.queued >= self._rules.max_queue:
            raise Overloaded(f"{self._engine.queued} requests are waiting already (--max-queue)", code="queue_full")
        limit = self._rules.request_timeout
        scope = asyncio.timeout(limit)
        try:
            async with scope:
                seq = self._sequence(generation, plan, request_id)
                wire_id = generation.prefix + request_id + ("" if generation.chat else "-0")
                async with (
                    self._receiving(generation, plan, seq) as held,
                    self._handoffs.leg(plan, Job(seq, wire_id, held.release)) as leg,
                ):
                    yield leg
        except TimeoutError:
            if not scope.expired():
                raise
            raise DeadlineExceeded(
                f"not finished within --request-timeout {limit:g} s", code="request_timeout"
            ) from None

    def _sequence(self, generation: Generation, plan: Plan, request_id: str) -> Sequence:
        prompt = generation.prompt
        length = len(prompt.token_ids)
        last = prompt.items[-1] if prompt.items else None
        runs_last_again = isinstance(plan, Ask | Fetch) or generation.params.n > 1
        if runs_last_again and last is not None and last.offset + last.num_tokens == length:
            raise BadRequest("the prompt ends in an image: its last token is run again, and no embedding is held then")
        try:
            positions = Positions.build(prompt.items, self._rules.merge_size, self._rules.mrope)
        except ValueError as error:
            raise BadRequest(str(error), param="messages") from None
        # A client may use an id twice at the same time; pins and publications may not.
        name = f"{request_id}#{next(self._numbers)}"
        return Sequence(name, list(prompt.token_ids), length, generation.to_run, prompt.items, positions=positions)

    @asynccontextmanager
    async def _receiving(self, generation: Generation, plan: Plan, seq: Sequence) -> AsyncIterator[Embeddings]:
        """Within, `seq` gets its embeddings, and is held where one is missing."""
        if isinstance(plan, Ask | Fetch) or not seq.items:
            yield Embeddings()
            return
        began, soon = time.monotonic(), asyncio.Event()

        def arrived() -> None:
            if held.missing is None:
                self._metrics.embeddings.observe(time.monotonic() - began)
                soon.set()
            self._engine.embedded(seq, list(held.rows), held.missing)

        async with self._receiver.receiving(seq.items, generation.embeddings, arrived) as held:
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(SOON):
                        await soon.wait()
            except BaseException:
                held.release()
                raise
            seq.embeddings, seq.held_at, seq.on_computed = list(held.rows), held.missing, held.compute
            yield held
