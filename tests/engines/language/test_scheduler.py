from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engines.language.scheduler import Limits, NeverFits, Scheduler, Step
from engines.language.sequence import Handoff, Item, SamplingParams, Sequence, Status
from tests.support.fake_runner import FakeCache, FakeRunner, expected


def make(
    name: str,
    prompt: int,
    max_tokens: int = 4,
    n: int = 1,
    handoff: Handoff = Handoff.NONE,
    start: int | None = None,
) -> Sequence:
    """Prompts with the same `start` begin alike; by default those of one length do."""
    first = len(name) + prompt if start is None else start
    tokens = [(7 * i + first) % 100 for i in range(prompt)]
    return Sequence(name, tokens, prompt, SamplingParams(max_tokens=max_tokens, n=n), handoff=handoff)


class Machine:
    """The engine's loop without its thread: schedule, swap, run, advance."""

    def __init__(
        self,
        num_blocks: int = 8,
        block_size: int = 4,
        max_num_seqs: int = 4,
        budget: int = 8,
        chunk_while_decoding: int | None = None,
    ) -> None:
        limits = Limits(num_blocks, block_size, 64, max_num_seqs, budget, chunk_while_decoding=chunk_while_decoding)
        self.scheduler = Scheduler(limits)
        self.cache = FakeCache(num_blocks, block_size)
        self.runner = FakeRunner(self.cache)
        self.done: list[Sequence] = []

    def step(self) -> Step:
        step = self.scheduler.schedule()
        for swap in step.swap_out:
            swap.seq.host_copy = self.cache.save(swap.blocks)
        for swap in step.swap_in:
            self.cache.restore(swap.seq.host_copy, swap.blocks)  # type: ignore[arg-type]
            swap.seq.host_copy = None
        tokens = iter(self.runner.run(step.scheduled))
        for entry in step.scheduled:
            self.scheduler.advance(entry, next(tokens).token_id if entry.sample else None)
        for entry in step.scheduled:
            self._finish(entry.seq)
        return step

    def _finish(self, seq: Sequence) -> None:
        if seq.num_output_tokens == 1 and seq.spare_blocks:
            for source, target in self.scheduler.fork(seq)[1]:
                self.cache.copy_block(source, target)
        if seq.num_output_tokens == seq.params.max_tokens:
            self.scheduler.drop(seq)
            self.done.append(seq)

    def fill(self, seq: Sequence) -> None:
        """What the other engine does to a remote sequence's blocks."""
        for position, token in enumerate(seq.token_ids):
            self.cache.write(seq.block_table, position, token)

    def run(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.step():
                return
        raise AssertionError(f"still busy after {limit} steps: {self.scheduler!r}")


def check_answers(machine: Machine) -> None:
    for seq in machine.done:
        prompt = seq.token_ids[: seq.num_prompt_tokens]
        assert seq.output_ids == expected(prompt, seq.params.max_tokens), seq


def test_a_prompt_gets_as_far_as_its_embeddings_and_holds_up_nobody() -> None:
    machine = Machine(num_blocks=16)
    held, other = make("held", 12), make("other", 6)
    held.held_at = 5
    machine.scheduler.add(held)
    machine.scheduler.add(other)
    assert [(s.seq.id, s.start, s.count, s.sample) for s in machine.step().scheduled] == [
        ("held", 0, 5, False),
        ("other", 0, 3, False),
    ]
    machine.run()
    assert machine.done == [other]
    held.held_at = 11
    assert [(s.seq.id, s.start, s.count, s.sample) for s in machine.step().scheduled] == [("held", 5, 6, False)]
    assert not machine.step(), "the last token is an item's: it is no decode"
    held.held_at = None
    machine.run()
    assert machine.done == [other, held]
    check_answers(machine)


def test_chunks_are_smaller_while_somebody_decodes() -> None:
    machine = Machine(num_blocks=16, chunk_while_decoding=3)
    machine.scheduler.add(make("a", 8, max_tokens=3))
    assert [(s.seq.id, s.count) for s in machine.step().scheduled] == [("a", 8)]
    machine.scheduler.add(make("b", 12))
    machine.scheduler.add(make("c", 2))
    assert [(s.seq.id, s.count) for s in machine.step().scheduled] == [("a", 1), ("b", 3)]
    assert [(s.seq.id, s.count) for s in machine.step().scheduled] == [("a", 1), ("b", 3)]
    assert [(s.seq.id, s.count) for s in machine.step().scheduled] == [("b", 6), ("c", 2)]
    machine.run()
    assert len(machine.done) == 3
    check_answers(machine)


def test_decodes_go_before_chunks_and_chunks_fill_the_budget() -> None:
    machine = Machine(num_blocks=16)
    machine.scheduler.add(make("a", 3))
    machine.step()
    machine.scheduler.add(make("b", 12))
    machine.scheduler.add(make("c", 2))
    assert [(s.seq.id, s.start, s.count, s.sample) for s in machine.step().scheduled] == [
        ("a", 3, 1, True),
        ("b", 0, 7, False),
    ]
    assert [(s.seq.id, s.start, s.count, s.sample) for s in machine.step().scheduled] == [
        ("a", 4, 1, True),
        ("b", 7, 5, True),
        ("c", 0, 2, True),
    ]
    machine.run()
    check_answers(machine)


def test_a_full_cache_preempts_the_newest_and_brings_it_back() -> None:
    machine = Machine(num_blocks=4)
    first, second = make("a", 7, max_tokens=9), make("b", 4, max_tokens=12)
    machine.scheduler.add(first)
    machine.scheduler.add(second)
    machine.run()
    assert machine.scheduler.preemptions > 0
    assert machine.done == [first, second]
    check_answers(machine)
    assert machine.scheduler.blocks.num_free == 4


def test_nobody_new_is_admitted_while_a_preempted_one_waits() -> None:
    machine = Machine(num_blocks=4)
    machine.scheduler.add(make("a", 7, max_tokens=9))
    machine.scheduler.add(second := make("b", 4, max_tokens=12))
    while second.status is not Status.SWAPPED:
        machine.step()
    machine.scheduler.add(third := make("c", 1))
    while second.status is Status.SWAPPED:
        assert third.status is Status.WAITING
        machine.step()
    machine.run()
    check_answers(machine)


def test_a_remote_sequence_holds_blocks_and_is_not_run_until_its_kv_is_there() -> None:
    machine = Machine()
    seq = make("a", 9, handoff=Handoff.RECEIVE)
    machine.scheduler.add(seq)
    step = machine.step()
    assert step.admitted == (seq,)
    assert step.scheduled == ()
    assert len(seq.block_table) == 3
    assert not machine.step()
    machine.fill(seq)
    machine.scheduler.arrived(seq)
    machine.scheduler.unpin(seq)
    assert [(s.start, s.count, s.sample) for s in machine.step().scheduled] == [(8, 1, True)]
    machine.run()
    check_answers(machine)


def test_an_aborted_sequence_keeps_pinned_blocks_until_the_transfer_lets_go() -> None:
    machine = Machine()
    seq = make("a", 9, handoff=Handoff.RECEIVE)
    machine.scheduler.add(seq)
    machine.step()
    machine.scheduler.drop(seq)
    machine.scheduler.arrived(seq)
    machine.scheduler.check()
    assert machine.scheduler.blocks.num_free == 5
    machine.scheduler.unpin(seq)
    machine.scheduler.unpin(seq)
    assert machine.scheduler.blocks.num_free == 8
    assert machine.scheduler.idle


def test_a_finished_prefill_keeps_its_blocks_until_they_are_read() -> None:
    machine = Machine()
    seq = make("a", 9, max_tokens=1, handoff=Handoff.SEND)
    machine.scheduler.add(seq)
    machine.run()
    assert seq.status is Status.FINISHED
    assert machine.scheduler.blocks.num_free == 5
    machine.scheduler.unpin(seq)
    assert machine.scheduler.blocks.num_free == 8


@pytest.mark.parametrize("prompt", [7, 8, 9])
def test_choices_share_the_prompt_and_copy_one_block(prompt: int) -> None:
    machine = Machine()
    machine.scheduler.add(make("a", prompt, max_tokens=3, n=3))
    machine.step()
    machine.step()
    machine.scheduler.check()
    machine.run()
    assert sorted(seq.index for seq in machine.done) == [0, 1, 2]
    check_answers(machine)
    assert machine.scheduler.blocks.num_free == 8


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "n", "limit"),
    [(60, 5, 1, "context length is 64"), (20, 14, 1, "holds 8 blocks of 4"), (29, 1, 2, "holds 8 blocks of 4")],
)
def test_what_can_never_fit_is_refused_with_the_limit(prompt: int, max_tokens: int, n: int, limit: str) -> None:
    machine = Machine()
    with pytest.raises(NeverFits, match=limit):
        machine.scheduler.add(make("a", prompt, max_tokens, n))
    assert machine.scheduler.idle
    machine.scheduler.limits.check(20, 13)


def cached(machine: Machine, seq: Sequence) -> int:
    """Run `seq` alone; the tokens of its prompt that needed no run."""
    machine.scheduler.add(seq)
    machine.run()
    assert seq in machine.done
    check_answers(machine)
    machine.scheduler.check()
    return seq.num_cached


def test_a_prompt_begins_with_the_whole_blocks_of_an_earlier_one() -> None:
    machine = Machine(num_blocks=16)
    assert cached(machine, make("first", 11, start=0)) == 0
    assert machine.scheduler.blocks.num_free == 16
    assert cached(machine, make("longer", 17, start=0)) == 8
    assert cached(machine, make("other", 17, start=1)) == 0
    assert cached(machine, make("same", 8, start=0)) == 4, "the last token is run, so its block is not shared"


def test_the_next_turn_of_a_conversation_begins_with_the_answer_too() -> None:
    machine = Machine(num_blocks=16)
    first = make("first", 7, max_tokens=6)
    assert cached(machine, first) == 0
    turn = make("second", 20)
    turn.token_ids[:13] = first.token_ids
    assert cached(machine, turn) == 12


def test_without_a_prefix_cache_every_prompt_is_run() -> None:
    machine = Machine(num_blocks=16)
    machine.scheduler = Scheduler(replace(machine.scheduler.limits, prefix_cache=False))
    assert [cached(machine, make(name, 11, start=0)) for name in "ab"] == [0, 0]


def test_running_sequences_share_what_they_begin_with() -> None:
    machine = Machine(num_blocks=16)
    machine.scheduler.add(make("a", 9, max_tokens=8, start=0))
    machine.step()
    machine.step()
    machine.scheduler.add(make("b", 9, max_tokens=8, start=0))
    machine.step()
    first, second = machine.scheduler.running
    assert first.block_table[:2] == second.block_table[:2]
    machine.run()
    check_answers(machine)


def test_images_of_one_size_are_told_apart_by_their_hash() -> None:
    machine = Machine(num_blocks=16)

    def seen(name: str, mm_hash: str, grid: tuple[int, int, int] = (1, 4, 4)) -> int:
        seq = make(name, 12, start=0)
        seq.items = (Item(mm_hash, "image", grid, offset=5, num_tokens=4),)
        return cached(machine, seq)

    assert seen("a", "cat") == 0
    assert seen("b", "dog") == 4, "what is before the image is alike"
    assert seen("c", "cat") == 8
    assert seen("d", "cat", (1, 2, 8)) == 4


def test_room_that_is_needed_is_taken_from_what_was_unused_for_longest() -> None:
    machine = Machine(num_blocks=8)
    assert cached(machine, make("old", 9, start=0)) == 0  # 3 blocks, of which 3 keep their names
    assert cached(machine, make("new", 9, start=1)) == 0
    assert cached(machine, make("large", 13, start=2)) == 0  # 4 blocks, of which 2 had no name
    assert cached(machine, make("again", 9, start=1)) == 8
    assert cached(machine, make("gone", 9, start=0)) < 8


def test_a_prompt_that_is_sent_on_needs_no_run_of_what_is_here_and_its_blocks_stay() -> None:
    machine = Machine()
    for name, hit in (("a", 0), ("b", 8)):
        seq = make(name, 9, max_tokens=1, handoff=Handoff.SEND, start=0)
        assert cached(machine, seq) == hit
    assert machine.scheduler.blocks.num_free == 4, "two blocks that both share, and one of each"
    for seq in machine.done:
        machine.scheduler.unpin(seq)
    assert machine.scheduler.blocks.num_free == 8


def test_blocks_that_another_engine_fills_are_its_own() -> None:
    machine = Machine()
    assert cached(machine, make("a", 9, start=0)) == 0
    seq = make("b", 9, handoff=Handoff.RECEIVE, start=0)
    machine.scheduler.add(seq)
    machine.step()
    assert (seq.num_cached, seq.num_computed) == (0, 0)


class RandomLife(RuleBasedStateMachine):
    """Any order of arrivals, steps, aborts, transfers that end: no block is lost, no answer is wrong, nothing hangs."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(num_blocks=6, block_size=2, max_num_seqs=3, budget=5)
        self.scheduler = self.machine.scheduler
        self.seqs: list[Sequence] = []

    @rule(
        prompt=st.integers(1, 10),
        max_tokens=st.integers(1, 8),
        n=st.integers(1, 3),
        handoff=st.sampled_from(Handoff),
        held_at=st.none() | st.integers(0, 9),
        start=st.integers(0, 1),
    )
    def add(self, prompt: int, max_tokens: int, n: int, handoff: Handoff, held_at: int | None, start: int) -> None:
        if handoff is Handoff.SEND:
            max_tokens, n = 1, 1
        seq = make(f"s{len(self.seqs)}", prompt, max_tokens, n, handoff, start)
        if handoff is not Handoff.RECEIVE and held_at is not None:
            seq.held_at = min(held_at, prompt - 1)
        try:
            self.scheduler.add(seq)
        except NeverFits:
            return
        self.seqs.append(seq)

    @rule()
    def step(self) -> None:
        self.machine.step()

    @precondition(lambda self: list(self.scheduler.sequences()))
    @rule(which=st.integers(0, 20))
    def abort(self, which: int) -> None:
        alive = list(self.scheduler.sequences())
        self.scheduler.drop(alive[which % len(alive)])

    @precondition(lambda self: self.scheduler.remote)
    @rule(which=st.integers(0, 20))
    def arrive(self, which: int) -> None:
        seq = self.scheduler.remote[which % len(self.scheduler.remote)]
        self.machine.fill(seq)
        self.scheduler.arrived(seq)

    @precondition(lambda self: self.seqs)
    @rule(which=st.integers(0, 20))
    def embed(self, which: int) -> None:
        self.seqs[which % len(self.seqs)].held_at = None

    @precondition(lambda self: self.seqs)
    @rule(which=st.integers(0, 20))
    def unpin(self, which: int) -> None:
        seq = self.seqs[which % len(self.seqs)]
        if seq.status is not Status.REMOTE and (seq.handoff is Handoff.RECEIVE or seq.status is Status.FINISHED):
            self.scheduler.unpin(seq)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        self.scheduler.check()

    @invariant()
    def nobody_runs_past_what_is_missing(self) -> None:
        for seq in self.scheduler.sequences():
            assert seq.held_at is None or seq.num_computed <= max(seq.held_at, seq.num_cached)

    @invariant()
    def answers_are_right(self) -> None:
        check_answers(self.machine)

    def teardown(self) -> None:
        for _ in range(50):
            self.machine.run()
            for seq in list(self.scheduler.remote):
                self.machine.fill(seq)
                self.scheduler.arrived(seq)
            for seq in self.seqs:
                seq.held_at = None
                self.scheduler.unpin(seq)
        assert self.scheduler.idle, self.scheduler
        assert self.scheduler.blocks.num_free == 6
        check_answers(self.machine)


TestRandomLife = RandomLife.TestCase
TestRandomLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
