"""The model thread of a rank that is not the first: it obeys, and does nothing of its own accord."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import torch

from engines.dtypes import named
from engines.language.attention import Query
from engines.language.mirror import Ready
from engines.language.parallel.group import Group
from engines.language.parallel.messages import (
    Command,
    CopyBlock,
    Errands,
    Forget,
    Load,
    Restore,
    Rows,
    Save,
    Stage,
    Step,
    Write,
    array_of,
    unpacked,
    unpacked_spans,
)
from engines.language.parallel.steps import KVStore
from engines.language.parallel.wire import Wire
from engines.language.runner import Pack, Patch, Runner
from engines.transfer.base import Spans

WritePush = Callable[[int, Spans, Spans, Ready | None, bool], None]
"""(key, source, target, ready, last): go on with a push of this rank's."""


class Follower:
    """`staged` takes what copies each `Stage` began."""

    def __init__(
        self,
        wire: Wire,
        group: Group,
        parts: tuple[KVStore, Runner],
        write: WritePush,
        staged: Callable[[Ready], None],
    ) -> None:
        self._wire = wire
        self._group = group
        self._cache, self._runner = parts
        self._write = write
        self._staged = staged
        self._saved: dict[int, Any] = {}
        self._decoder = msgspec.msgpack.Decoder[Command](Command)

    def run(self) -> None:
        """Until rank 0 is gone. Raises what the model raises."""
        while True:
            try:
                command = self._receive()
            except (EOFError, OSError):
                return
            self._obey(command)

    def _receive(self) -> Command:
        command: Command = self._decoder.decode(self._wire.receive())
        return command

    @torch.inference_mode()
    def _obey(self, command: Command) -> None:
        match command:
            case Step():
                self._runner.forward(self._pack(command), self._errands if command.errands else None)
            case Load():
                self._cache.load(unpacked(command.blocks))
            case CopyBlock():
                self._cache.copy_block(command.source, command.target)
            case Save():
                self._saved[command.number] = self._cache.save(unpacked(command.blocks))
            case Restore():
                self._cache.restore(self._saved[command.number], unpacked(command.blocks))
            case Forget():
                for number in command.numbers:
                    del self._saved[number]
            case Errands():
                raise RuntimeError("rank 0 sent errands outside a step")

    def _errands(self, first: int, last: int) -> None:
        """Rank 0 is as far, and says what is to be done with the KV of these layers."""
        command = self._receive()
        if not isinstance(command, Errands):
            raise RuntimeError(f"rank 0 sent {type(command).__name__} in the midst of a step")
        ready: Ready | None = None
        for errand in command.errands:
            match errand:
                case Stage():
                    ready = self._cache.stage(range(errand.first, errand.last), unpacked(errand.blocks))
                    if ready is not None:
                        self._staged(ready)
                case Write():
                    spans = unpacked_spans(errand.source), unpacked_spans(errand.target)
                    self._write(errand.key, *spans, ready if errand.staged else None, errand.last)

    def _pack(self, step: Step) -> Pack:
        return Pack(
            token_ids=array_of(step.token_ids),
            positions=array_of(step.positions).reshape(3, -1),
            queries=tuple(Query(unpacked(share.blocks), share.start, share.count) for share in step.shares),
            patches=tuple(self._patch(rows) for rows in step.patches),
            last_rows=tuple(step.last_rows),
        )

    def _patch(self, rows: Rows) -> Patch:
        dtype = named(rows.dtype)
        whole = torch.empty(rows.count, rows.width, dtype=dtype, device=self._runner.model.device)
        self._group.spread(whole)
        return Patch(rows.first, whole)
