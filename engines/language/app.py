"""The language engine's HTTP routes: OpenAI's chat and completions, streamed or whole. How a request runs stands in
`service`, how bodies are read and answers shaped in `requests` and `answers`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from engines.errors import EngineError
from engines.http import DONE, check_model, json_response, read_json, request_id, sse
from engines.language import descriptors, roles
from engines.language.answers import Answer, usage_of
from engines.language.choices import Choice, Piece
from engines.language.descriptors import Plan, Publish, Push
from engines.language.embeddings import EmbeddingReceiver
from engines.language.engine import LanguageEngine
from engines.language.handoff import Leg
from engines.language.metrics import Metrics
from engines.language.parallel.carrier import Carrier
from engines.language.requests import Generation, Served, parse
from engines.language.roles import Roles
from engines.language.service import Service
from engines.settings import LanguageSettings
from engines.store.store import EmbeddingStore
from engines.transfer.base import Transfer
from engines.weights import LoadReport

log = logging.getLogger(__name__)

LARGE = 64 << 10  # bytes of a body whose prompt is tokenised off the loop
DRAIN_POLL = 0.02


@dataclass(frozen=True, slots=True)
class Parts:
    """What /info and /metrics look at. The first transfer is the one that carries KV."""

    engine: LanguageEngine
    receiver: EmbeddingReceiver
    transfers: Sequence[Transfer]
    carrier: Carrier
    weights: LoadReport
    metrics: Metrics
    store: EmbeddingStore | None = None


Lend = Callable[[Mapping[str, Any]], AbstractAsyncContextManager[Mapping[str, Any]]]
"""A request's body as this engine reads it, with media that an encoder in this process has taken over."""


class LanguageApp:
    """An `engines.http.Engine`. `lend`: of the encoder in this process; without one, bodies are read as they come."""

    def __init__(self, settings: LanguageSettings, served: Served, service: Service, parts: Parts) -> None:
        self.lend: Lend = nullcontext
        self._roles = Roles(settings.role, self.drain)
        parts.metrics.follow(self._roles)
        self.registry = parts.metrics.registry
        self._settings = settings
        self._served = served
        self._service = service
        self._parts = parts

    @property
    def role(self) -> str:
        return self._roles.now

    @property
    def stage(self) -> str:
        return self._roles.stage

    def routes(self) -> Iterable[web.RouteDef]:
        yield web.post("/v1/chat/completions", self.chat)
        yield web.post("/v1/completions", self.completions)
        yield web.post("/role", self.switch)

    def info(self) -> Mapping[str, Any]:
        stats, limits = self._parts.engine.stats, self._parts.engine.limits
        transfer, receiver, weights = self._parts.transfers[0], self._parts.receiver, self._parts.weights
        return {
            "transfer": {
                "name": transfer.name,
                "host": transfer.address.host,
                "port": transfer.address.port,
                "nonce": transfer.address.nonce,
                "audit": self._audit(),
            },
            "tensor_parallel": self._parts.carrier.size,
            "started_as": self._roles.started_as,
            "turning_to": self._roles.next,
            "block_size": limits.block_size,
            "num_blocks": limits.num_blocks,
            "free_blocks": stats.free_blocks,
            "waiting": stats.waiting,
            "running": stats.running,
            "remote": stats.remote,
            "swapped": stats.swapped,
            "preemptions": stats.preemptions,
            "embeddings": {"capacity": receiver.capacity, "free": receiver.free},
            "max_model_len": limits.max_model_len,
            "weights": {
                "tensors": len(weights.names),
                "bytes": weights.nbytes,
                "prefixes": list(weights.prefixes),
            },
            **({} if (store := self._parts.store) is None else {"embedding_store": store.info()}),
        }

    async def drain(self) -> None:
        """Until prefilled KV has been read, or its lease is over, and pushes are settled. What others owe us can go."""
        while (audit := self._audit())["publications"] or audit["pushes"]:  # noqa: ASYNC110 - nobody tells when
            await asyncio.sleep(DRAIN_POLL)

    async def check(self) -> None:
        await self._parts.engine.check()
        self._parts.receiver.pool.check()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        with self._roles.serving():
            return await self._generate(request, chat=True)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        with self._roles.serving():
            return await self._generate(request, chat=False)

    async def switch(self, request: web.Request) -> web.Response:
        """Another role, once everything in flight is over. Whoever hangs up before the answer leaves it as it was."""
        role, seconds = roles.asked(await read_json(request), self._settings.switch_timeout)
        was = self.role
        await self._roles.switch(role, seconds)
        return json_response({"role": self.role, "was": was})

    async def _generate(self, request: web.Request, chat: bool) -> web.StreamResponse:
        began = time.monotonic()
        body = await read_json(request)
        check_model(body, self._settings)
        plan = self._roles.plan(body.get(descriptors.FIELD))
        sends = isinstance(plan, Push | Publish)
        async with self.lend(body) as read:
            if (request.content_length or 0) > LARGE:
                generation = await asyncio.to_thread(parse, read, chat, self._served, sends)
            else:
                generation = parse(read, chat, self._served, sends)
            return await self._run(request, generation, plan, began)

    async def _run(self, request: web.Request, generation: Generation, plan: Plan, began: float) -> web.StreamResponse:
        reply = _Reply(self._served, generation, self._answer(generation), self._parts.metrics, began)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        try:
            async with self._service.run(generation, plan, request_id()) as leg:
                if not generation.stream or isinstance(plan, Push | Publish):
                    return json_response(await reply.whole(leg))
                async with aclosing(reply.events(leg)) as events:
                    async for event in events:
                        if not response.prepared:
                            await response.prepare(request)
                        await response.write(event)
            await response.write(DONE)
        except EngineError as error:
            if not response.prepared:
                raise
            log.error("the stream broke: %r", error)
            await response.write(sse(error.body(self.stage)))
        except ConnectionResetError:
            log.info("the client went away")
        return response

    def _answer(self, generation: Generation) -> Answer:
        return Answer(
            id=generation.prefix + request_id(),
            model=self._settings.name,
            created=int(time.time()),  # noqa: TID251 - a date for clients, no interval
            chat=generation.chat,
            logprobs=generation.params.logprobs is not None,
            include_usage=generation.include_usage,
            token_ids=generation.token_ids,
        )

    def _audit(self) -> dict[str, int]:
        parts = self._parts
        audits = [parts.carrier.audit(), *(transfer.audit() for transfer in parts.transfers[1:])]
        return {name: sum(audit[name] for audit in audits) for name in audits[0]}


class _Reply:
    """One request's answer while it grows, and what is measured of it."""

    def __init__(self, served: Served, generation: Generation, answer: Answer, metrics: Metrics, began: float) -> None:
        self._generation = generation
        self._answer = answer
        self._metrics = metrics
        self._last: float | None = None
        self._began = began
        params = generation.params
        self._choices = [Choice(index, served.tokenizer, params) for index in range(params.n)]
        self._choices[0].replay(generation.continued)

    async def whole(self, leg: Leg) -> dict[str, Any]:
        async for _ in self._pieces(leg):
            pass
        return self._answer.whole(self._choices, self._usage(leg), await leg.finish())

    async def events(self, leg: Leg) -> AsyncGenerator[bytes, None]:
        """Server-sent events, up to but without `[DONE]`."""
        opened: set[int] = set()
        async for pieces in self._pieces(leg):
            event = b""
            for piece in pieces:
                if self._answer.chat and piece.index not in opened:
                    opened.add(piece.index)
                    event += sse(self._answer.opening(piece.index))
                if piece or (self._answer.token_ids and piece.token_ids):
                    event += sse(self._answer.chunk(piece))
            if event:
                yield event
        if self._generation.include_usage:
            yield sse(self._answer.closing(self._usage(leg)))

    async def _pieces(self, leg: Leg) -> AsyncIterator[list[Piece]]:
        async for tokens in leg.stream:
            self._measure(len(tokens))
            pieces = []
            for index in sorted({token.index for token in tokens}):
                choice = self._choices[index]
                if choice.finish_reason is not None:
                    continue  # what was computed before the engine heard of a stop string
                pieces.append(choice.push(token for token in tokens if token.index == index))
                if choice.stopped:
                    leg.stream.stop(index)
            yield pieces
            if all(choice.finish_reason for choice in self._choices):
                return  # the engine may not know yet of a stop string

    def _measure(self, count: int) -> None:
        now = time.monotonic()
        if self._last is None:
            self._metrics.first_token.observe(now - self._began)
        else:
            self._metrics.per_token.observe((now - self._last) / count)
        self._last = now

    def _usage(self, leg: Leg) -> dict[str, Any]:
        prompt_tokens = len(self._generation.prompt.token_ids) - len(self._generation.continued)
        cached_tokens = min(leg.stream.num_cached, prompt_tokens)
        usage = usage_of(prompt_tokens, self._choices, cached_tokens)
        self._metrics.tokens.labels("cached").inc(cached_tokens)
        self._metrics.tokens.labels("prompt").inc(usage["prompt_tokens"])
        self._metrics.tokens.labels("generated").inc(usage["completion_tokens"])
        return usage
