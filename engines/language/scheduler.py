"""What the next step runs: continuous batching over a paged KV cache. Plain decisions, without clock, tensors, threads.

Every step gives each decoding sequence its token first, then fills the token budget with chunks of prompts, oldest
first, or less than the budget, since those that decode wait for it; a prompt that waits for an embedding gets as far as
its item. When the cache is full the newest running sequence is swapped out to host memory, and comes back before
anybody new is admitted. The oldest can always go on, because no request is admitted that could not run alone.

A prompt that begins as an earlier one did, images included, begins with the blocks of that where they still are.

Blocks that a transfer may touch are pinned by one more reference, which only `unpin` drops: an aborted sequence gives
back its own references at once, and the blocks are free when the transfer has let go too.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count

from engines.language.blocks import BlockAllocator
from engines.language.prefix import names
from engines.language.sequence import Handoff, Scheduled, Sequence, Status


class NeverFits(Exception):
    """The request exceeds a limit of this engine and no waiting would help. The message names the limit."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What this engine can hold. `max_batched_tokens` is the budget of one step, `chunk_while_decoding` what prompts
    get of it beside sequences that decode."""

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_batched_tokens: int
    prefix_cache: bool = True  # keep the KV of prompts that are over, while nobody needs the room
    chunk_while_decoding: int | None = None

    @property
    def max_tokens(self) -> int:
        """The longest chain of tokens, prompt and output, that one sequence can have. (The last one needs no KV.)"""
        return min(self.max_model_len, self.num_blocks * self.block_size + 1)

    def check(self, num_prompt_tokens: int, max_tokens: int, n: int = 1) -> None:
        """Raise NeverFits unless `n` choices of `max_tokens` tokens can be generated after this prompt."""
        total = num_prompt_tokens + max_tokens
        if total > self.max_model_len:
            raise NeverFits(
                f"this model's maximum context length is {self.max_model_len} tokens, but {total} were asked for: "
                f"{num_prompt_tokens} in the prompt and {max_tokens} to generate"
            )
        needed = max(-(-(total - 1) // self.block_size), -(-num_prompt_tokens // self.block_size) + n - 1)
        if needed > self.num_blocks:
            raise NeverFits(
                f"this engine's KV cache holds {self.num_blocks} blocks of {self.block_size} tokens, but the request "
                f"needs {needed}: {num_prompt_tokens} prompt tokens, {max_tokens} to generate, n={n}"
            )


@dataclass(frozen=True, slots=True)
class Swap:
    """A sequence's KV to copy to host memory, or back from it, and the blocks it is in or goes to."""

    seq: Sequence
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """The work of one step, in this order: swap out, swap in, run. `admitted` are the pinned that now hold blocks."""

    scheduled: tuple[Scheduled, ...] = ()
    swap_out: tuple[Swap, ...] = ()
    swap_in: tuple[Swap, ...] = ()
    admitted: tuple[Sequence, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.scheduled or self.swap_out or self.swap_in or self.admitted)


class Scheduler:
    """Owns the queues and the blocks. Not thread-safe: the model thread owns it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.blocks = BlockAllocator(limits.num_blocks, limits.block_size)
        self.waiting: deque[Sequence] = deque()
        self.returning: list[Sequence] = []  # oldest first; swapped out, or holding KV and waiting for a slot
        self.remote: list[Sequence] = []
        self.running: list[Sequence] = []  # oldest first
        self.preemptions = 0
        self._pins: dict[str, list[int]] = {}
        self._arrivals = count()

    # -- what happens to a sequence ---------------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence. Raises NeverFits."""
        self.limits.check(seq.num_prompt_tokens, seq.params.max_tokens, seq.params.n)
        seq.arrival = next(self._arrivals)
        self.waiting.append(seq)

    def arrived(self, seq: Sequence) -> None:
        """The KV of its prompt is there; only the last prompt token is left to run. Nothing if it was dropped."""
        if seq.status is not Status.REMOTE:
            return
        seq.move(Status.WAITING)
        seq.num_computed = seq.num_prompt_tokens - 1
        self.remote.remove(seq)
        insort(self.returning, seq, key=_arrival)

    def drop(self, seq: Sequence) -> None:
        """It has finished, failed or been aborted: give back its blocks, except what is pinned. Idempotent."""
        if seq.status is Status.FINISHED:
            return
        for queue in (self.running, self.remote, self.waiting, self.returning):
            if seq in queue:
                queue.remove(seq)
        self._give_back(seq)
        seq.host_copy = None
        seq.move(Status.FINISHED)

    def unpin(self, seq: Sequence) -> None:
        """No transfer can touch its blocks any more. Idempotent; a dropped sequence's blocks become free by it."""
        self.blocks.release(self._pins.pop(seq.id, ()))

    def advance(self, scheduled: Scheduled, token_id: int | None) -> None:
        """The step ran it; `token_id` is what was sampled."""
        seq, size = scheduled.seq, self.limits.block_size
        before = seq.num_computed // size
        seq.num_computed += scheduled.count
        if self.limits.prefix_cache and seq.num_computed // size > before and seq.block_table:
            whole = names(seq, seq.num_computed // size, size)
            for block, name in zip(seq.block_table[before:], whole[before:], strict=False):
                self.blocks.name(block, name)
        if token_id is not None:
            seq.token_ids.append(token_id)

    def fork(self, seq: Sequence) -> tuple[list[Sequence], list[tuple[int, int]]]:
        """The n - 1 other choices of a request whose prompt has just been computed, and blocks to copy, (from, to).

        They share all blocks but that of the last prompt token, which each runs again for a first token of its own.
        """
        whole = (seq.num_prompt_tokens - 1) // self.limits.block_size
        forks, copies = [], []
        for index, spare in enumerate(seq.spare_blocks, start=1):
            fork = seq.fork(index)
            fork.arrival = next(self._arrivals)
            fork.num_computed = seq.num_prompt_tokens - 1
            fork.block_table = [*self.blocks.share(seq.block_table[:whole]), spare]
            copies.append((seq.block_table[whole], spare))
            forks.append(fork)
        seq.spare_blocks = []
        self.returning.extend(forks)
        return forks, copies

    # -- the decision -----------------------------------------------------------------------------------------------

    def schedule(self) -> Step:
        """Choose the next step and take its blocks. An empty step: nothing can run until something else happens."""
        budget = self.limits.max_batched_tokens
        scheduled, swap_out = self._decodes(budget)
        if scheduled and self.limits.chunk_while_decoding:
            budget = min(budget, len(scheduled) + self.limits.chunk_while_decoding)
        scheduled += _chunks([seq for seq in self.running if seq.remaining > 1], budget - _tokens(scheduled))
        swap_in: list[Swap] = []
        admitted: list[Sequence] = []
        if not swap_out:
            started = self._readmit(swap_in)
            started += self._admit(admitted, budget - _tokens(scheduled) - sum(seq.runnable for seq in started))
            scheduled += _chunks(started, budget - _tokens(scheduled))
        return Step(tuple(scheduled), tuple(swap_out), tuple(swap_in), tuple(admitted))

    def _decodes(self, budget: int) -> tuple[list[Scheduled], list[Swap]]:
        scheduled: list[Scheduled] = []
        swap_out: list[Swap] = []
        for seq in list(self.running):
            if len(scheduled) == budget:
                break
            if seq.status is Status.RUNNING and seq.remaining == seq.runnable == 1 and self._grow(seq, swap_out):
                scheduled.append(Scheduled(seq, seq.num_computed, 1, sample=True))
        return scheduled, swap_out

    def _grow(self, seq: Sequence, swap_out: list[Swap]) -> bool:
        """Room for its next token, at the cost of the newest if need be, itself included. False: not in this step."""
        missing = self.blocks.blocks_for(seq.num_tokens) - len(seq.block_table)
        while self.blocks.num_free < missing:
            # Never an older one: it may be in this step already. A pinned one would free nothing.
            victims = [s for s in self.running if s.arrival >= seq.arrival and s.id not in self._pins]
            if not victims:
                return False
            self._preempt(victims[-1], swap_out)
            if victims[-1] is seq:
                return False
        seq.block_table += self.blocks.allocate(missing) if missing > 0 else []
        return True

    def _preempt(self, seq: Sequence, swap_out: list[Swap]) -> None:
        swap_out.append(Swap(seq, self._computed_blocks(seq)))
        self._give_back(seq)
        self.running.remove(seq)
        seq.move(Status.SWAPPED)
        insort(self.returning, seq, key=_arrival)
        self.preemptions += 1

    def _readmit(self, swap_in: list[Swap]) -> list[Sequence]:
        """The oldest that return, while there are slots. Those that hold blocks never wait for one that needs them."""
        started: list[Sequence] = []
        full = False
        for seq in list(self.returning):
            if len(self.running) == self.limits.max_num_seqs:
                break
            if seq.status is Status.SWAPPED:
                full = full or not self._take(seq)
                if full:
                    continue
                swap_in.append(Swap(seq, self._computed_blocks(seq)))
            self.returning.remove(seq)
            self._start(seq)
            started.append(seq)
        return started

    def _admit(self, admitted: list[Sequence], budget: int) -> list[Sequence]:
        """New sequences, first come first served, and none while a preempted one waits for room."""
        started: list[Sequence] = []
        while self.waiting and not any(seq.status is Status.SWAPPED for seq in self.returning):
            seq = self.waiting[0]
            receives = seq.handoff is Handoff.RECEIVE
            if not receives and (budget <= 0 or len(self.running) == self.limits.max_num_seqs):
                break
            if not self._take(seq):
                break
            self.waiting.popleft()
            if seq.handoff is not Handoff.NONE:
                self._pins[seq.id] = self.blocks.share(seq.block_table)
                admitted.append(seq)
            if receives:
                seq.move(Status.REMOTE)
                self.remote.append(seq)
                continue
            self._start(seq)
            started.append(seq)
            budget -= seq.runnable
        return started

    def _take(self, seq: Sequence) -> bool:
        """All the blocks of the tokens it has so far, and those of its forks, if there are enough.

        One block for each running sequence is left, or its next token would swap the newcomer out again.
        """
        known = self._known(seq)
        table = self.blocks.blocks_for(seq.num_tokens) - len(known)
        spare = 0 if seq.num_output_tokens else seq.params.n - 1
        if table + spare + len(self.running) > self.blocks.num_free - self.blocks.num_idle(known):
            return False
        seq.block_table = self.blocks.share(known) + self.blocks.allocate(table)
        seq.spare_blocks = self.blocks.allocate(spare)
        if known:
            seq.num_computed = seq.num_cached = len(known) * self.limits.block_size
        return True

    def _known(self, seq: Sequence) -> list[int]:
        """The blocks that its prompt begins with, where they are here. Its last token is run whatever is known."""
        if not self.limits.prefix_cache or seq.num_computed or seq.handoff is Handoff.RECEIVE:
            return []
        size = self.limits.block_size
        return self.blocks.find(names(seq, (seq.num_prompt_tokens - 1) // size, size))

    def _start(self, seq: Sequence) -> None:
        seq.move(Status.RUNNING)
        insort(self.running, seq, key=_arrival)

    def _give_back(self, seq: Sequence) -> None:
        self.blocks.release(seq.block_table)
        self.blocks.release(seq.spare_blocks)
        seq.block_table = []
        seq.spare_blocks = []

    def _computed_blocks(self, seq: Sequence) -> tuple[int, ...]:
        return tuple(seq.block_table[: self.blocks.blocks_for(seq.num_computed)])

    # -- the invariant ----------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.returning or self.remote or self.running)

    def sequences(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.remote
        yield from self.returning
        yield from self.waiting

    def check(self) -> None:
        """Raise RuntimeError unless every block is accounted for and every sequence is where its status says."""
        alive = list(self.sequences())
        self.blocks.check([*(s.block_table for s in alive), *(s.spare_blocks for s in alive), *self._pins.values()])
        for queue, statuses in (
            (self.running, {Status.RUNNING}),
            (self.remote, {Status.REMOTE}),
            (self.returning, {Status.SWAPPED, Status.WAITING}),
            (self.waiting, {Status.WAITING}),
        ):
            for seq in queue:
                if seq.status not in statuses:
                    raise RuntimeError(f"{seq!r} is in the wrong queue")
        if len(self.running) > self.limits.max_num_seqs:
            raise RuntimeError(f"{len(self.running)} sequences run, the limit is {self.limits.max_num_seqs}")

    def __repr__(self) -> str:
        return (
            f"<Scheduler running={len(self.running)} remote={len(self.remote)} returning={len(self.returning)} "
            f"waiting={len(self.waiting)} pinned={len(self._pins)} {self.blocks!r}>"
        )


def _arrival(seq: Sequence) -> int:
    return seq.arrival


def _tokens(scheduled: Iterable[Scheduled]) -> int:
    return sum(entry.count for entry in scheduled)


def _chunks(seqs: Iterable[Sequence], budget: int) -> list[Scheduled]:
    """As much of each sequence's uncomputed tokens as the budget and its embeddings allow, in order."""
    scheduled = []
    for seq in seqs:
        count = min(seq.runnable, budget)
        if count > 0:
            scheduled.append(Scheduled(seq, seq.num_computed, count, sample=count == seq.remaining))
            budget -= count
    return scheduled
