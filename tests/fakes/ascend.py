"""Scripted vLLM-Ascend engines, with the failure behaviour of the real ones' connectors.

Decode reserves blocks for each sequence of a request and calls the metaserver from one of 32 threads, whatever becomes
of its HTTP caller, and does not look at the answer. Only prefill's message that it is done frees it: without that it
waits for ever, and keeps the blocks of a request that was hung up on. `blocks` holds them.

A token is a number: of a prompt the bytes of its JSON, of an answer 1000 and up, one for each of `pieces`.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from tests.fakes.native import Call, Engine

TOKENS_FIELD = "_vllm_ascend_recompute_token_ids"
FIRST_PIECE = 1000
THREADS = 32


@dataclass
class World:
    """What engines of one deployment share: a folder of embeddings, and the ways from prefill to decode."""

    folder: set[str] = field(default_factory=set)
    decodes: dict[str, Decode] = field(default_factory=dict)

    def engines(self, prefill_first: bool = False) -> dict[str, Any]:
        """Factories by the letter of `deployment`'s topology."""
        return {
            "e": lambda: Encoder(self),
            "p": lambda: Prefill(self, prefill_first),
            "d": lambda: Decode(self),
            "b": lambda: Combined(self),
        }


@dataclass
class Sequence:
    """One prompt and choice of a request, as its decode engine knows it."""

    name: str
    prompt: list[int]
    choice: int
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Ascend(Engine):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response({"detail": "Not Found"}, status=404)


class Encoder(Ascend):
    """Leaves a file for each item, and answers as if it had been asked for text."""

    role = "encode"

    async def answer(self, request: web.Request, call: Call) -> web.StreamResponse:
        return web.json_response(await self.reply(call))

    async def reply(self, call: Call) -> dict[str, Any]:
        self.world.folder.update(names(call.body))
        message = {"role": "assistant", "content": ""}
        return {"id": f"chatcmpl-{call.id}", "choices": [{"index": 0, "message": message, "finish_reason": "length"}]}


class Language(Ascend):
    """`encoded` counts the items that it had to encode itself."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.encoded = 0
        self.reads_tokens = True  # False: an engine too old to take a chat's tokens from the proxy
        self.give_up: deque[int] = deque()  # the next answers: pieces after which the sequence is preempted

    async def answer(self, request: web.Request, call: Call) -> web.StreamResponse:
        if call.body.get("stream"):
            return await self._stream(request, call)
        return web.json_response(await self.reply(call))

    def prompts(self, body: dict[str, Any]) -> list[list[int]]:
        if "messages" in body:
            told = (body.get("kv_transfer_params") or {}).get(TOKENS_FIELD)
            text = [part for part in _parts(body) if part.get("type") == "text"] or body["messages"][0]["content"]
            found = told if told and self.reads_tokens else list(json.dumps([text, names(body)]).encode())
            return [found]
        prompt = body["prompt"]
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        return [one if isinstance(one, list) else list(one.encode()) for one in (prompt if several else [prompt])]

    def sequences(self, call: Call) -> list[Sequence]:
        n = call.body.get("n") or 1
        found = []
        for index, prompt in enumerate(self.prompts(call.body)):
            name = f"chatcmpl-{call.id}" if "messages" in call.body else f"cmpl-{call.id}-{index}"
            for k in range(n):
                found.append(Sequence(f"{k}_{name}" if n > 1 else name, prompt, index * n + k))
        return found

    async def reply(self, call: Call) -> dict[str, Any]:
        said = self._said(call)
        chat = "messages" in call.body
        choices, usage = [], {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        for sequence, tokens, ending in said:
            text = "".join(map(self.piece, tokens))
            choice: dict[str, Any] = {"index": sequence.choice, **ending}
            choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            if call.body.get("return_token_ids"):
                choice["token_ids"] = tokens
                if not chat:
                    choice["prompt_token_ids"] = sequence.prompt
            choices.append(choice)
            usage["prompt_tokens"] += len(sequence.prompt)
            usage["completion_tokens"] += len(tokens)
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        told = {"prompt_token_ids": said[0][0].prompt} if chat and call.body.get("return_token_ids") else {}
        return {"id": call.id, "created": 1, "model": "tiny", "choices": choices, "usage": usage, **told}

    def _events(self, call: Call) -> list[bytes]:
        chat, tells = "messages" in call.body, bool(call.body.get("return_token_ids"))

        def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
            value = {"id": call.id, "created": 1, "model": "tiny", "choices": choices, **more}
            return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"

        events = []
        said = self._said(call)
        for sequence, tokens, ending in said:
            shown = {"prompt_token_ids": sequence.prompt} if tells else {}
            opening: dict[str, Any] = {"index": sequence.choice, "finish_reason": None}
            if chat:
                events.append(event([opening | {"delta": {"role": "assistant", "content": ""}}], **shown))
            else:
                events.append(event([opening | {"text": "", **shown}]))
            for token in tokens:
                text = {"delta": {"content": self.piece(token)}} if chat else {"text": self.piece(token)}
                ids = {"token_ids": [token]} if tells else {}
                events.append(event([{"index": sequence.choice, "finish_reason": None, **text, **ids}]))
            events.append(event([{"index": sequence.choice, **({"delta": {}} if chat else {"text": ""}), **ending}]))
        if (call.body.get("stream_options") or {}).get("include_usage"):
            prompt, answer = len(said[0][0].prompt), sum(len(tokens) for _, tokens, _ in said)
            usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
            events.append(event([], usage=usage))
        return [*events, b"data: [DONE]\n\n"]

    def piece(self, token: int) -> str:
        return self.pieces[token - FIRST_PIECE]

    def _said(self, call: Call) -> list[tuple[Sequence, list[int], dict[str, Any]]]:
        """Each sequence with its tokens and its end; those that stand in the prompt are not said again."""
        limit = call.body.get("max_completion_tokens") or call.body.get("max_tokens") or len(self.pieces)
        found = []
        for sequence in self.sequences(call):
            begin = sum(token >= FIRST_PIECE for token in sequence.prompt)
            tokens = list(range(FIRST_PIECE + begin, FIRST_PIECE + len(self.pieces)))
            ending = {"finish_reason": "stop" if limit >= len(tokens) else "length", "stop_reason": None}
            tokens = tokens[:limit]
            if self.give_up:
                tokens = tokens[: self.give_up.popleft()]
                ending = {"finish_reason": "stop", "stop_reason": "recomputed"}
            found.append((sequence, tokens, ending))
        return found

    def look_up(self, body: dict[str, Any]) -> None:
        self.encoded += sum(name not in self.world.folder for name in names(body))


class Combined(Language):
    async def answer(self, request: web.Request, call: Call) -> web.StreamResponse:
        self.look_up(call.body)
        return await super().answer(request, call)


class Prefill(Language):
    """Layer-wise, it writes to the decode engine that its parameters name, then says that it is done. Prefill first,
    it answers where its KV is. A layer-wise one dies of parameters that no decode engine wrote."""

    role = "prefill"

    def __init__(self, world: World, first: bool) -> None:
        super().__init__(world)
        self.first = first
        self.dead = False
        self.silent = False  # its last message is lost

    async def reply(self, call: Call) -> dict[str, Any]:
        params = call.body.get("kv_transfer_params") or {}
        self.look_up(call.body)
        answer = await super().reply(call)
        if not self.first and params.get("do_remote_decode"):
            await self._push(call, params)
        elif self.first and params.get("do_remote_decode"):
            handoff = {"do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [1, 2]}
            answer["kv_transfer_params"] = handoff | {"remote_host": "127.0.0.1", "remote_port": self.port}
        return answer

    async def _push(self, call: Call, params: dict[str, Any]) -> None:
        if "remote_cached_tokens" not in params:
            self.dead, self.healthy = True, False
            raise web.HTTPInternalServerError(text="EngineCore died: KeyError 'remote_cached_tokens'")
        decode = self.world.decodes.get(str(params["remote_engine_id"]))
        if decode is not None and not self.silent:
            await decode.receive(params["request_id"], self.prompts(call.body)[0])


class Decode(Language):
    role = "decode"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.blocks: dict[str, Sequence] = {}
        self.most_wanted = 0  # sequences at once whose call was not answered yet
        self.wrong: list[str] = []  # sequences that were given the KV of other tokens
        self.statuses: list[int] = []  # of the metaserver's answers, which it does not look at
        self._wanted = 0
        self._threads = asyncio.Semaphore(THREADS)
        self._calls: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await super().start()
        self.world.decodes[self.netloc] = self

    async def stop(self) -> None:
        for task in self._calls:
            task.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        await super().stop()

    async def receive(self, name: str, prompt: list[int]) -> None:
        """Prefill's message that all layers of a sequence are written."""
        sequence = self.blocks.pop(name, None)
        if sequence is not None:
            if sequence.prompt != prompt:
                self.wrong.append(name)
            sequence.done.set()
        await self._announce()

    async def answer(self, request: web.Request, call: Call) -> web.StreamResponse:
        params = call.body.get("kv_transfer_params") or {}
        if params.get("do_remote_prefill") and "metaserver" in params:
            sequences = self.sequences(call)
            for sequence in sequences:
                self.blocks[sequence.name] = sequence
                task = asyncio.create_task(self._ask(params["metaserver"], sequence))
                self._calls.add(task)
            for sequence in sequences:
                await sequence.done.wait()
        return await super().answer(request, call)

    async def _ask(self, url: str, sequence: Sequence) -> None:
        self._wanted += 1
        self.most_wanted = max(self.most_wanted, self._wanted)
        async with self._threads, aiohttp.ClientSession() as session:
            try:
                async with session.post(url, json=self.descriptor(sequence.name)) as response:
                    self.statuses.append(response.status)
            finally:
                self._wanted -= 1
                await self._announce()

    def descriptor(self, name: str) -> dict[str, Any]:
        return {
            "token_ids": [],
            "request_id": name,
            "do_remote_prefill": False,
            "do_remote_decode": True,
            "remote_block_ids": [[len(self.blocks)]],
            "remote_block_size": [128],
            "remote_engine_id": self.netloc,
            "remote_host": "127.0.0.1",
            "remote_port": self.port,
            "remote_tp_size": 1,
            "remote_pcp_size": 1,
            "remote_dcp_size": 1,
            "remote_cached_tokens": 0,
        }


def _parts(body: dict[str, Any]) -> list[dict[str, Any]]:
    contents = [message["content"] for message in body.get("messages", ())]
    return [part for content in contents if isinstance(content, list) for part in content]


def names(body: dict[str, Any]) -> list[str]:
    """What the items of a request are called in the folder."""
    media = [part for part in _parts(body) if part.get("type") != "text"]
    return [part.get("uuid") or json.dumps(part, sort_keys=True) for part in media]
