"""The process of a rank that is not the first: its share of the model, its KV, its transfer. It serves no route and
decides nothing; when rank 0 is gone it ends.

    control socket ▸ loop           questions: load, meet, transfers
    steps socket   ▸ model thread   steps, in the order in which rank 0 runs them
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import torch

from engines.devices import pinned
from engines.errors import SetupError
from engines.language.build import kv_transfer, layout_of, load_model, step_parts
from engines.language.kv import KVCache
from engines.language.model import LanguageModel
from engines.language.parallel.follower import Follower
from engines.language.parallel.group import Processes
from engines.language.parallel.messages import Answered, Asked, Begin, Cancel, Connect, Ping, Question
from engines.language.parallel.transfers import RankTransfers
from engines.language.parallel.wire import Line, Wire
from engines.language.runner import Runner
from engines.settings import LanguageSettings
from engines.transfer.base import TransferError
from engines.transfer.messages import refusal
from engines.transfer.tasks import Tasks

log = logging.getLogger(__name__)


class Rank:
    """Answers rank 0. `run` ends when rank 0 is gone, and raises what the model raises."""

    def __init__(self, line: Line[Asked], steps: socket.socket) -> None:
        self._line = line
        self._steps = steps
        self._tasks = Tasks()
        self._asked: dict[int, asyncio.Task[None]] = {}
        self._stack = AsyncExitStack()
        self._settings: LanguageSettings | None = None
        self._model: LanguageModel | None = None
        self._group: Processes | None = None
        self._transfers: RankTransfers | None = None
        self._stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        listening = self._tasks.spawn(self._listen())
        try:
            await asyncio.wait({listening, self._stopped}, return_when=asyncio.FIRST_COMPLETED)
            if self._stopped.done():
                self._stopped.result()
        finally:
            if self._group is not None:
                self._group.abort()
            await self._tasks.close()
            await self._stack.aclose()

    async def _listen(self) -> None:
        while True:
            try:
                asked = await self._line.receive()
            except EOFError:
                return
            if isinstance(asked.body, Cancel):
                if (task := self._asked.get(asked.body.id)) is not None:
                    task.cancel()
            else:
                self._asked[asked.id] = self._tasks.spawn(self._answer(asked))

    async def _answer(self, asked: Asked) -> None:
        try:
            self._line.send(Answered(asked.id, await self._do(asked.body)))
        except TransferError as error:
            self._line.send(Answered(asked.id, refused=refusal(error)))
        except Exception as error:  # noqa: BLE001 - whatever it is, rank 0 waits for an answer
            self._line.send(Answered(asked.id, fatal=str(error) if isinstance(error, SetupError) else repr(error)))
        finally:
            del self._asked[asked.id]

    async def _do(self, question: Question) -> dict[str, Any] | None:
        match question:
            case Begin():
                self._settings = LanguageSettings(**json.loads(question.settings))
                self._group = Processes(question.rank, self._settings.tensor_parallel, self._settings.rank_timeout)
                if self._settings.threads:
                    torch.set_num_threads(self._settings.threads)
                self._model = await asyncio.to_thread(load_model, self._settings, self._group)
            case Connect():
                await self._connect(question)
            case Ping():
                pass
            case _:
                assert self._transfers is not None
                return await self._transfers.answer(question)
        return None

    async def _connect(self, question: Connect) -> None:
        settings, model, group = self._settings, self._model, self._group
        assert settings is not None
        assert model is not None
        assert group is not None
        layout = layout_of(settings, model.facts, model.dtype)
        try:
            transfer = kv_transfer(settings)
            self._stack.push_async_callback(transfer.close)
            transfer.facts = layout.facts()
            arena = transfer.allocate("kv", layout.nbytes)
            await transfer.start()
        except (TransferError, OSError) as error:
            raise SetupError(f"--transfer {settings.transfer}: {error}") from None
        transfers = self._transfers = RankTransfers(transfer, arena, self._line.send)
        self._stack.push_async_callback(transfers.close)
        buffer = self._stack.enter_context(pinned(arena.buffer, model.device))

        def meet() -> tuple[KVCache, Runner]:
            group.connect(Path(question.meeting), model.device)
            return step_parts(settings, model, layout, buffer)

        parts = await asyncio.to_thread(meet)
        follower = Follower(Wire(self._steps, None), group, parts, transfers.write, transfers.staged)
        threading.Thread(target=self._follow, args=(follower,), name="model", daemon=True).start()

    def _follow(self, follower: Follower) -> None:
        loop, error = self._stopped.get_loop(), None
        if self._model is not None and self._model.device.type == "cuda":
            torch.cuda.set_device(self._model.device)
        try:
            follower.run()
        except Exception as raised:
            log.critical("a step failed", exc_info=raised)
            error = raised

        def stop() -> None:
            if self._stopped.done():
                return
            if error is None:
                self._stopped.set_result(None)
            else:
                self._stopped.set_exception(error)

        loop.call_soon_threadsafe(stop)


async def serve(steps: socket.socket, control: socket.socket) -> None:
    line = await Line[Asked].on(control, Asked)
    try:
        await Rank(line, steps).run()
    finally:
        line.close()
