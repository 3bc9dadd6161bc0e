"""The nouns of the language engine: what a request asks for, where it stands, and what one step runs of it.

No tensors and no decisions live here: `embeddings`, `positions`, `generator` and `host_copy` are opaque to this half of
the engine and belong to the model side. The scheduler alone changes a sequence's status and blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop. `top_k` 0 or -1 and `logprobs` None mean off; `seed` None: fresh dice."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class Item:
    """One image or video in a prompt, or one of a video's pieces where text stands between these: its placeholder
    tokens are `token_ids[offset : offset + num_tokens]`, and its embedding's rows from `row` on stand there.

    `grid` is (t, h, w) in patches, before the spatial merge. `interval`: positions from one of its t to the next.
    `rows`: all that the embedding of `mm_hash` has, where other pieces have some of them; 0: it has `num_tokens`.
    """

    mm_hash: str
    modality: str
    grid: tuple[int, int, int]
    offset: int
    num_tokens: int
    row: int = 0
    rows: int = 0
    interval: float = 1.0

    @property
    def num_rows(self) -> int:
        """Of the whole embedding."""
        return self.rows or self.num_tokens


class Status(Enum):
    """Where a sequence stands. See `TRANSITIONS` for the legal moves."""

    WAITING = auto()  # in the queue; holds no blocks, unless its KV has just arrived
    REMOTE = auto()  # holds blocks that another engine fills; never run
    RUNNING = auto()  # holds blocks; run in every step that has room
    SWAPPED = auto()  # preempted; its KV is in host memory
    FINISHED = auto()


TRANSITIONS: Mapping[Status, frozenset[Status]] = {
    Status.WAITING: frozenset({Status.REMOTE, Status.RUNNING, Status.FINISHED}),
    Status.REMOTE: frozenset({Status.WAITING, Status.FINISHED}),
    Status.RUNNING: frozenset({Status.SWAPPED, Status.FINISHED}),
    Status.SWAPPED: frozenset({Status.RUNNING, Status.FINISHED}),
    Status.FINISHED: frozenset(),
}


class Handoff(Enum):
    """What another engine does with this sequence's KV. All but NONE pin its blocks while a transfer may touch them."""

    NONE = auto()
    SEND = auto()  # our prefill, somebody else's decode
    RECEIVE = auto()  # somebody else's prefill, our decode


@dataclass(slots=True, eq=False)
class Sequence:
    """One chain of tokens: the prompt, then what was generated. Compared by identity.

    `num_computed` counts the tokens whose KV is in `block_table`'s blocks. A sequence that can decode has exactly one
    token beyond it.
    """

    id: str
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    items: tuple[Item, ...] = ()
    embeddings: object | None = None  # one per item: its rows, sliced like a tensor [rows, width]; None: none is here
    held_at: int | None = None  # the first token whose row of an embedding is not here; None: nothing is missing
    on_computed: Callable[[int], None] | None = None  # told on the loop how many tokens of the prompt are computed
    positions: object | None = None  # engines.language.positions.Positions
    generator: object | None = None  # the sampler's dice
    index: int = 0  # which of the request's n choices
    handoff: Handoff = Handoff.NONE
    status: Status = Status.WAITING
    num_computed: int = 0
    num_cached: int = 0  # those of them that were there before: a prefix that another request had computed
    names: list[bytes] = field(default_factory=list)  # of its first whole blocks: see `prefix`
    block_table: list[int] = field(default_factory=list)
    spare_blocks: list[int] = field(default_factory=list)  # set aside for the forks of an n > 1 request
    host_copy: object | None = None  # the swapped-out KV
    arrival: int = 0  # order of admission to the queue; the scheduler sets it

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def remaining(self) -> int:
        """Tokens whose KV is not computed yet: 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def runnable(self) -> int:
        """Those of `remaining` that can be computed now: what is before a missing embedding."""
        if self.held_at is None:
            return len(self.token_ids) - self.num_computed
        return max(0, self.held_at - self.num_computed)

    def move(self, status: Status) -> None:
        """Change status by the table; an illegal move is a bug and names both ends."""
        if status not in TRANSITIONS[self.status]:
            raise RuntimeError(f"sequence {self.id} cannot go from {self.status.name} to {status.name}")
        self.status = status

    def fork(self, index: int) -> Sequence:
        """Another choice over the same prompt, with its own dice. It holds no blocks: the scheduler shares ours."""
        seed = None if self.params.seed is None else self.params.seed + index
        return Sequence(
            id=f"{self.id}/{index}",
            token_ids=self.token_ids[: self.num_prompt_tokens],
            num_prompt_tokens=self.num_prompt_tokens,
            params=replace(self.params, n=1, seed=seed),
            items=self.items,
            embeddings=self.embeddings,
            positions=self.positions,
            index=index,
            names=list(self.names),
        )

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.id} {self.status.name} prompt={self.num_prompt_tokens} output={self.num_output_tokens} "
            f"computed={self.num_computed} blocks={self.block_table}>"
        )


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Run `token_ids[start : start + count]`; `sample` the next token, which is when that reaches the end."""

    seq: Sequence
    start: int
    count: int
    sample: bool
