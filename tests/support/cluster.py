"""A whole deployment for one test module, and the question every fault test ends with: is everything given back?"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from bench.soak import held
from deploy.deployment import Deployment, Topology
from deploy.processes import Child
from tests.support.checkpoints import checkpoint
from tests.support.waiting import eventually

CHUNK = 64  # tokens per step: an image and a long prompt take several
ENGINE = ("--dtype", "float32", "--threads", "1", "--log-level", "warning")
LANGUAGE = ("--max-batched-tokens", str(CHUNK), "--kv-blocks", "1024", "--no-prefix-cache")  # prompts come again
ROLES: dict[str, Sequence[str]] = {"prefill": LANGUAGE, "decode": LANGUAGE, "both": LANGUAGE}


@dataclass
class Answer:
    """What a client got: status, headers, the JSON body or the events of a stream."""

    status: int
    headers: dict[str, str]
    body: Any = None
    events: tuple[Any, ...] = ()
    done: bool = False

    @property
    def choices(self) -> list[dict[str, Any]]:
        return list(self.body["choices"]) if self.body else []

    @property
    def text(self) -> str:
        """The text of choice 0, streamed or not."""
        if self.body is not None:
            choice = self.body["choices"][0]
            return str(choice["message"]["content"] if "message" in choice else choice["text"])
        deltas = [event["choices"][0] for event in self.events if event.get("choices")]
        return "".join(delta["delta"].get("content") or "" if "delta" in delta else delta["text"] for delta in deltas)

    @property
    def error(self) -> dict[str, Any] | None:
        """The error object, whether it was the body or the last event of a stream."""
        holders = [self.body] if self.body is not None else self.events
        return next((holder["error"] for holder in holders if "error" in holder), None)


class Client:
    """Talks HTTP to one URL, as an OpenAI client would."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self.url = session, url

    async def chat(self, content: object, *, timeout: float = 60, **fields: Any) -> Answer:
        """One chat completion, greedy unless told otherwise."""
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0, **fields}
        return await self.post("/v1/chat/completions", body, timeout=timeout)

    async def post(self, path: str, body: dict[str, Any], *, timeout: float = 60) -> Answer:
        limit = aiohttp.ClientTimeout(total=timeout)
        async with self._session.post(self.url + path, json={"model": "tiny", **body}, timeout=limit) as response:
            headers = {name.lower(): value for name, value in response.headers.items()}
            if not headers["content-type"].startswith("text/event-stream"):
                return Answer(response.status, headers, await response.json(content_type=None))
            return self._stream(response.status, headers, await response.text())

    @staticmethod
    def _stream(status: int, headers: dict[str, str], text: str) -> Answer:
        data = [event.removeprefix("data: ") for event in text.split("\n\n") if event.startswith("data: ")]
        done = bool(data) and data[-1] == "[DONE]"
        return Answer(status, headers, None, tuple(json.loads(event) for event in data if event != "[DONE]"), done)

    async def get(self, path: str) -> Any:
        async with self._session.get(self.url + path, timeout=aiohttp.ClientTimeout(total=10)) as response:
            return await response.json(content_type=None)

    async def text(self, path: str) -> str:
        async with self._session.get(self.url + path, timeout=aiohttp.ClientTimeout(total=10)) as response:
            return await response.text()


class Cluster(Client):
    """A deployment and a client of its proxy."""

    def __init__(self, deployment: Deployment, session: aiohttp.ClientSession) -> None:
        super().__init__(session, deployment.url)
        self.deployment = deployment

    def engine(self, role: str) -> Child:
        return self.deployment.role(role)[0]

    def client(self, child: Child) -> Client:
        return Client(self._session, child.url)

    async def info(self, role: str) -> Any:
        return await self.client(self.engine(role)).get("/info")

    async def idle(self, seconds: float = 20.0) -> None:
        """Wait until no lease, block, transfer or embedding is held by anybody.

        :raises TimeoutError: naming what is still held.
        """

        held: dict[str, Any] = {}

        async def nothing_held() -> bool:
            held.clear()
            held.update(await self.held())
            return not held

        try:
            await eventually(nothing_held, seconds)
        except TimeoutError:
            raise AssertionError(f"still held after {seconds} s: {held}") from None

    async def held(self) -> dict[str, Any]:
        """Everything that is not at rest, by process; empty when all is."""
        return await held(self._session, self.deployment)


@asynccontextmanager
async def cluster(
    family: str,
    topology: str,
    *,
    engine_arguments: Sequence[str] = (),
    role_arguments: dict[str, Sequence[str]] | None = None,
    **options: Any,
) -> AsyncIterator[Cluster]:
    """Start a deployment on the family's tiny checkpoint; stop it at the end."""
    deployment = Deployment(
        checkpoint(family),
        Topology.parse(topology),
        engine_arguments=(*ENGINE, "--served-model-name", "tiny", *engine_arguments),
        role_arguments=ROLES | (role_arguments or {}),
        **options,
    )
    async with deployment, aiohttp.ClientSession() as session:
        yield Cluster(deployment, session)
