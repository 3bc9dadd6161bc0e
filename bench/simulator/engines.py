"""A simulated language engine: prefill in chunks before decode, decode steps advanced many at a time.

    waiting ──KV room──▶ prefilling ──its last chunk: first token──▶ running ──its last token──▶ ended

The loop runs one thing at a time: a chunk of prefill while there is one, else decode steps until a sequence ends or
another comes. Encoding inline is a stall in the same loop, before the sequence's first chunk. No event per token: n
steps of a batch that does not change take first · n + slope · n (n-1) / 2 seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from heapq import heappop, heappush
from math import ceil, sqrt

from bench.simulator.caches import Cache
from bench.simulator.clock import Clock
from bench.simulator.models import Cost, Language, Vision
from bench.simulator.requests import Media
from bench.simulator.stations import Station

_EPSILON = 1e-9  # of a decode step: a step that ends now has ended


@dataclass(frozen=True, slots=True)
class Engine:
    """What an engine that prefills, decodes or does both is made of."""

    language: Language
    vision: Vision | None = None  # with one it can encode inline
    chunk: int = 8192  # tokens of a prefill step
    max_running: int = 256
    kv_tokens: int = 1_000_000
    overhead: float = 0.0  # seconds of a request outside the loop: HTTP, tokenizing
    hosts: int = 1  # processes that prepare media for inline encoding
    embedding_bytes: float = 1e9  # of a cache of embeddings that it encoded inline
    prefix_tokens: float = 0.0  # of KV kept for prompts that begin alike; 0: none is
    mixed: bool = False  # a decode step rides along with each chunk
    overlap: bool = False  # a prompt is computed up to its first image that is still encoded elsewhere


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a prompt: `key` is equal for prompts that are the same up to its end, and None if no other ever is."""

    key: Hashable | None
    end: int  # tokens of the prompt up to here
    media: Media | None = None


class Generation:
    """A request in an engine: made by who sends it there, changed by the engine alone."""

    __slots__ = (
        "available",
        "begun",
        "cached",
        "computed",
        "delivered",
        "failed",
        "first",
        "hits",
        "last",
        "output",
        "parts",
        "prompt",
        "room",
    )

    def __init__(
        self,
        parts: tuple[Part, ...],
        output: int,
        first: Callable[[Generation], None],
        last: Callable[[Generation], None],
        failed: Callable[[], None],
    ) -> None:
        self.parts = parts
        self.prompt = parts[-1].end if parts else 1
        self.output = output  # tokens, the first included
        self.first = first  # its first token is there
        self.last = last  # its last one is; the same moment where there is only one
        self.failed = failed
        self.delivered: Collection[
            str
        ] = ()  # identities of media whose embeddings come with it; others are encoded here
        self.available = self.prompt  # tokens that can be computed by now
        self.computed = 0
        self.cached = 0  # tokens of the prompt that were here already
        self.hits = 0  # items that were encoded here already
        self.room = 0
        self.begun = 0.0  # when its prefill began

    def up_to(self, arrived: Collection[str]) -> int:
        """Tokens of the prompt before the first media whose embeddings are on their way."""
        end = 0
        for part in self.parts:
            if part.media is not None and part.media.identity in self.delivered and part.media.identity not in arrived:
                return end
            end = part.end
        return end

    def inline(self) -> list[tuple[int, Media]]:
        """Media that this engine must see itself, each with the tokens of the prompt up to its end."""
        parts, delivered = self.parts, self.delivered
        return [
            (part.end, part.media) for part in parts if part.media is not None and part.media.identity not in delivered
        ]


class SimulatedEngine:
    """`generates`: sequences decode here after their prefill; else they leave with their first token."""

    def __init__(self, clock: Clock, spec: Engine, generates: bool) -> None:
        self.spec = spec
        self._clock = clock
        self._generates = generates
        self._hosts = Station(clock, spec.hosts)
        self._embeddings = Cache(spec.embedding_bytes)
        self._prefixes = Cache(spec.prefix_tokens)
        self._arrived: deque[Generation] = deque()  # with KV from elsewhere
        self._waiting: deque[Generation] = deque()
        self._prefilling: list[Generation] = []
        self._running: list[tuple[int, int, Generation]] = []  # a heap by the step that is its last
        self._kv = 0  # tokens of those that run
        self._reserved = 0  # tokens of KV promised
        self._steps = 0  # decode steps done
        self._turn = 0
        self._busy = False
        self._life = 0  # of what is scheduled: anything older is void
        self._segment: tuple[float, float, float, int] | None = None  # began, first, slope, steps
        self._present: dict[Generation, None] = {}  # in the order in which they came
        self.alive = True
        self.slowness = 1.0

    def __repr__(self) -> str:
        waiting = len(self._waiting) + len(self._arrived)
        return f"<SimulatedEngine {waiting} waiting, {len(self._prefilling)} prefilling, {len(self._running)} running>"

    # ---- what is asked of it

    def prefill(self, generation: Generation) -> None:
        """From the first token of the prompt on; media are prepared first where they are encoded here."""
        self._present[generation] = None
        held = self._held(generation) if self.spec.prefix_tokens else 0
        missing = [media for end, media in generation.inline() if end > held and media.identity not in self._embeddings]
        for number, media in enumerate(missing, 1):
            ready = self._queue if number == len(missing) else _ignore
            self._hosts.serve(self._cost(media).host * self.slowness, ready, generation)
        if not missing:
            self._queue(generation)

    def decode(self, generation: Generation) -> None:
        """The prompt's KV has come from elsewhere, with the first token."""
        self._present[generation] = None
        self._arrived.append(generation)
        self._wake()

    def extend(self, generation: Generation, available: int) -> None:
        """More of its prompt can be computed."""
        generation.available = available
        self._wake()

    def cancel(self, generation: Generation) -> None:
        """It will never be complete: parts of its prompt cannot be computed yet."""
        if generation not in self._present:
            return
        del self._present[generation]
        if generation in self._prefilling:
            self._prefilling.remove(generation)
            self._reserved -= generation.room
        elif generation in self._waiting:
            self._waiting.remove(generation)
        self._wake()

    def kill(self) -> None:
        """All that is in work fails, and nothing is remembered."""
        self.alive = False
        self._life += 1
        for queue in (self._arrived, self._waiting, self._prefilling, self._running):
            queue.clear()
        for forgetful in (self._hosts, self._embeddings, self._prefixes):
            forgetful.clear()
        self._kv = self._reserved = 0
        self._busy, self._segment = False, None
        present, self._present = self._present, {}
        for generation in present:
            generation.failed()

    def restart(self) -> None:
        self.alive = True

    # ---- the loop

    def _queue(self, generation: Generation) -> None:
        if generation in self._present:
            self._waiting.append(generation)
            self._wake()

    def _wake(self) -> None:
        if not self._busy:
            self._next()
        elif self._segment is not None and self._wanted():
            self._interrupt(self._segment)

    def _wanted(self) -> bool:
        """Whether something is there for which decoding must pause."""
        if self._arrived and self._fits(self._arrived[0]):
            return True
        if self._waiting and self._fits(self._waiting[0]):
            return True
        return any(generation.available > generation.computed for generation in self._prefilling)

    def _interrupt(self, segment: tuple[float, float, float, int]) -> None:
        """End the segment with the step that runs now."""
        began, first, slope, steps = segment
        done = max(1, ceil(_steps(self._clock.now - began, first, slope) - _EPSILON))
        if done < steps:
            self._life += 1
            self._segment = began, first, slope, done
            self._clock.at(began + _seconds(done, first, slope), self._decoded, done, self._life)

    def _next(self) -> None:
        self._segment, self._busy = None, True
        while self._arrived and self._fits(self._arrived[0]):
            generation = self._arrived.popleft()
            self._reserve(generation)
            self._started(generation)
        chunk = self._chunk()
        self._busy = bool(chunk or self._running)
        if chunk:
            self._prefill(chunk)
        elif self._running:
            steps = self._running[0][0] - self._steps
            first, slope = self.spec.language.step(len(self._running), self._kv)
            first, slope = first * self.slowness, slope * self.slowness
            self._segment = self._clock.now, first, slope, steps
            self._clock.after(_seconds(steps, first, slope), self._decoded, steps, self._life)

    def _chunk(self) -> list[tuple[Generation, int]]:
        """Who gets how many tokens of the next prefill step."""
        budget, chunk = self.spec.chunk, []
        for generation in self._prefilling:
            count = min(budget, generation.available - generation.computed)
            if count > 0:
                chunk.append((generation, count))
                budget -= count
        while budget > 0 and self._waiting and self._fits(self._waiting[0]):
            generation = self._waiting.popleft()
            self._reserve(generation)
            self._admit(generation)
            self._prefilling.append(generation)
            count = min(budget, generation.available - generation.computed)
            if count > 0:
                chunk.append((generation, count))
                budget -= count
        return chunk

    def _fits(self, generation: Generation) -> bool:
        generation.room = generation.prompt + (generation.output if self._generates else 0)
        places = len(self._prefilling) + len(self._running)
        if not places:
            return True  # nobody will leave to make room
        return places < self.spec.max_running and self._reserved + generation.room <= self.spec.kv_tokens

    def _reserve(self, generation: Generation) -> None:
        self._reserved += generation.room
        generation.begun = self._clock.now

    def _admit(self, generation: Generation) -> None:
        """What is here already need not be computed; the last token must be."""
        if self.spec.prefix_tokens:
            generation.cached = min(self._held(generation), generation.prompt - 1)
            generation.computed = generation.cached

    def _held(self, generation: Generation) -> int:
        """Tokens of its prompt that are in KV."""
        held = 0
        for part in generation.parts:
            if part.key is None or not self._prefixes.touch(part.key):
                break
            held = part.end
        return held

    def _prefill(self, chunk: list[tuple[Generation, int]]) -> None:
        tokens = sum(count for _, count in chunk)
        context = sum(count * generation.computed for generation, count in chunk) // tokens
        seconds = self.spec.language.prefill(tokens, context)
        for generation, _ in chunk:
            if generation.computed == generation.cached:
                seconds += self._encode(generation)
        rides = self.spec.mixed and bool(self._running)
        if rides:
            seconds += self.spec.language.step(len(self._running), self._kv)[0]
        self._clock.after(seconds * self.slowness, self._prefilled, chunk, rides, self._life)

    def _encode(self, generation: Generation) -> float:
        """Seconds on this engine's GPUs for the media that are in no cache."""
        seconds = 0.0
        for end, media in generation.inline():
            if end <= generation.cached or self._embeddings.touch(media.identity):
                generation.hits += 1
            else:
                cost = self._cost(media)
                self._embeddings.put(media.identity, cost.nbytes)
                seconds += cost.gpu
        return seconds

    def _prefilled(self, chunk: list[tuple[Generation, int]], rides: bool, life: int) -> None:
        if life != self._life:
            return
        if rides:
            self._step(1)
        for generation, count in chunk:
            generation.computed += count
            if generation.computed >= generation.prompt:
                self._prefilling.remove(generation)
                if self.spec.prefix_tokens:
                    self._remember(generation)
                self._started(generation)
        self._next()

    def _remember(self, generation: Generation) -> None:
        begin = 0
        for part in generation.parts:
            if part.key is None:
                break
            self._prefixes.put(part.key, part.end - begin)
            begin = part.end

    def _started(self, generation: Generation) -> None:
        """It has its first token."""
        more = generation.output - 1 if self._generates else 0
        generation.first(generation)
        if more <= 0:
            self._end(generation)
            return
        self._turn += 1
        heappush(self._running, (self._steps + more, self._turn, generation))
        self._kv += generation.prompt + 1

    def _decoded(self, steps: int, life: int) -> None:
        if life == self._life:
            self._segment = None
            self._step(steps)
            self._next()

    def _step(self, steps: int) -> None:
        self._steps += steps
        self._kv += steps * len(self._running)
        while self._running and self._running[0][0] <= self._steps:
            generation = heappop(self._running)[2]
            self._kv -= generation.prompt + generation.output
            self._end(generation)

    def _end(self, generation: Generation) -> None:
        self._reserved -= generation.room
        self._present.pop(generation, None)
        generation.last(generation)

    def _cost(self, media: Media) -> Cost:
        if self.spec.vision is None:
            raise ValueError("an engine without a vision model was given media")
        return self.spec.vision.cost(media)


def _seconds(steps: int, first: float, slope: float) -> float:
    return first * steps + slope * steps * (steps - 1) / 2


def _steps(seconds: float, first: float, slope: float) -> float:
    """How many steps fit: the inverse of `_seconds`."""
    if not slope:
        return seconds / first
    middle = first - slope / 2
    return (sqrt(middle * middle + 2 * slope * seconds) - middle) / slope


def _ignore(generation: Generation) -> None:
    """An item that is not its request's last one."""
