"""One simulated request on its way, as the live proxy would take it: plan, encode, transfer, prefill, decode, again.

Holds are closed and lessons learnt where the proxy does it: an encode leg's when it is encoded, a prefill's with its
first token, the rest at the end. A leg that fails is redrawn by the planner, as long as nothing has been answered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import nan
from time import perf_counter
from typing import NamedTuple

from bench.simulator.clock import Clock
from bench.simulator.encoders import Encode
from bench.simulator.engines import Generation, SimulatedEngine
from bench.simulator.links import LinkBetween
from bench.simulator.machines import Park
from bench.simulator.models import Vision
from bench.simulator.parsing import Parser, prompt
from bench.simulator.requests import Request
from bench.simulator.results import Results
from bench.simulator.stations import Station
from proxy.core import BOTH, Handle, Leg, Plan, Role
from proxy.errors import Broken, EngineFailed, ProxyError, Unreachable
from proxy.lessons import Lessons, ahead
from proxy.planning.plan import Holds, Planner, family_of, reader
from proxy.retry import STAGES

ATTEMPTS = 3  # of a request's legs at each stage, as `--max-attempts`


@dataclass(frozen=True, slots=True)
class World:
    """What all courses share. `vision` tells what media are truly worth; the proxy only predicts it."""

    clock: Clock
    planner: Planner
    parser: Parser
    park: Park
    vision: Vision | None
    embedding_link: LinkBetween
    kv_link: LinkBetween
    inlets: dict[str, Station]  # by URL of the receiver
    lessons: Lessons
    results: Results


class _Sent(NamedTuple):
    """A leg that runs."""

    leg: Leg
    ahead: int  # predicted tokens before it
    began: float


class _Share(NamedTuple):
    """What one encode leg brought: it can be sent again from there."""

    url: str
    nbytes: int
    identities: list[str]


class Course:
    __slots__ = (
        "_arrival",
        "_arrived",
        "_attempts",
        "_decision",
        "_encode_wait",
        "_encoded",
        "_encodes",
        "_encoding",
        "_first",
        "_generation",
        "_hits",
        "_holds",
        "_job",
        "_life",
        "_media",
        "_plan",
        "_ready",
        "_request",
        "_shares",
        "_tried",
        "_world",
    )

    def __init__(self, world: World, request: Request) -> None:
        self._world = world
        self._request = request
        self._media = request.media
        self._holds = Holds()
        self._tried: set[str] = set()
        self._life = 0  # of the present generation: what an older one still brings is void
        self._encodes = True  # false: what encoders still bring is void
        self._encoding = 0  # legs that encoders have not ended
        self._shares: list[_Share] = []  # encoded
        self._arrived: set[str] = set()  # identities whose embeddings are where they are read
        self._plan: Plan | None = None
        self._generation: Generation | None = None
        self._arrival = world.clock.now
        self._encoded = self._encode_wait = self._ready = 0.0
        self._first = nan
        self._hits = self._attempts = 0
        self._decision = 0.0

    def begin(self) -> None:
        world = self._world
        self._job = world.parser.job(self._request)
        began = perf_counter()
        try:
            plan = self._plan = world.planner.draw(self._job, world.clock.now, self._holds)
        except ProxyError as error:
            self._end(error)
            return
        self._decision = perf_counter() - began
        self._follow(plan)

    def _follow(self, plan: Plan) -> None:
        encodes = plan.encodes if plan.path.encodes else ()
        self._encoding = len(encodes)
        for leg in encodes:
            self._encode(leg)
        if not encodes or self._world.park.engines[reader(plan).url].spec.overlap:
            self._generate()

    # ---- encode

    def _encode(self, leg: Leg) -> None:
        sent = self._sent(leg)
        encoder = self._world.park.encoders[leg.instance.url]
        media = [self._media[item.index] for item in leg.items]
        if encoder.alive:
            encoder.encode(
                media, lambda encode: self._leg_encoded(sent, encode), lambda: self._encode_failed(sent, False)
            )
        else:
            self._soon(self._encode_failed, sent, True)

    def _leg_encoded(self, sent: _Sent, encode: Encode) -> None:
        world = self._world
        self._learn_encoded(sent, encode)
        self._succeeded(sent)
        if not self._encodes:
            return
        self._encoding -= 1
        self._hits += len(encode.cached)
        self._encoded = world.clock.now - self._arrival
        self._encode_wait = max(0.0, world.clock.now - sent.began - encode.busy)
        share = _Share(sent.leg.instance.url, encode.nbytes, [item.identity for item in sent.leg.items])
        self._shares.append(share)
        self._send(share)

    def _learn_encoded(self, sent: _Sent, encode: Encode) -> None:
        handles = {
            item.index: Handle(item.identity, item.modality, {}, {"cached": item.identity in encode.cached})
            for item in sent.leg.items
        }
        self._world.lessons.encoded(sent.leg, handles, sent.ahead, self._world.clock.now - sent.began)

    def _send(self, share: _Share) -> None:
        """One leg's embeddings to whoever reads them."""
        world = self._world
        assert self._plan is not None
        to = reader(self._plan).url
        link = world.embedding_link(share.url, to)
        seconds = link.seconds(share.nbytes, world.park.engines[to].spec.language.ranks)
        world.inlets[to].serve(seconds, world.clock.after, link.latency, self._leg_arrived, share, self._life)

    def _leg_arrived(self, share: _Share, life: int) -> None:
        if life != self._life:
            return
        self._arrived.update(share.identities)
        generation = self._generation
        if generation is not None:
            self._ready = self._world.clock.now
            assert self._plan is not None
            self._world.park.engines[reader(self._plan).url].extend(generation, generation.up_to(self._arrived))
        elif not self._encoding and len(self._arrived) == sum(len(share.identities) for share in self._shares):
            self._generate()

    def _encode_failed(self, sent: _Sent, refused: bool) -> None:
        """Its items go to another encoder; to none, if there is no other and engines may encode."""
        self._failed(sent, refused)
        self._world.lessons.lost([sent.leg])
        if not self._encodes:
            return
        world, plan, now = self._world, self._plan, self._world.clock.now
        assert plan is not None
        self._tried.add(sent.leg.instance.url)
        self._attempts += 1
        tried = self._tried
        leg = None
        if self._attempts < ATTEMPTS * len(plan.encodes):
            leg = world.planner.encoder(sent.leg.items, now, tried, family_of(plan), self._holds)
        if leg is not None:
            self._encode(leg)
            return
        self._withdraw()
        self._encodes = False
        inline = world.planner.inline(plan, self._job, now, self._holds)
        if inline is None:
            self._end(_error(sent.leg, refused))
        else:
            self._plan = inline
            self._generate()

    def _withdraw(self) -> None:
        """What has been asked of an engine, while items still encode."""
        self._life += 1
        generation, plan = self._generation, self._plan
        if generation is not None and plan is not None:
            self._world.park.engines[reader(plan).url].cancel(generation)
        self._generation = None

    # ---- prefill and decode

    def _generate(self) -> None:
        world, plan = self._world, self._plan
        assert plan is not None
        self._ready = world.clock.now
        leg = plan.leg(BOTH if plan.path.combined else Role.PREFILL)
        engine = world.park.engines[leg.instance.url]
        sent, life = self._sent(leg), self._life
        generation = Generation(
            prompt(self._request, engine.spec.vision or world.vision),
            self._request.output_tokens,
            lambda generation: self._prefilled(sent, generation, life),
            lambda generation: self._last(sent, generation, life),
            lambda: self._generation_failed(sent, False, life),
        )
        if plan.path.encodes:
            generation.delivered = {item.identity for leg in plan.encodes for item in leg.items}
            generation.available = generation.up_to(self._arrived)
        self._generation = generation
        if engine.alive:
            self._soon(self._prefill, engine, generation, life, seconds=engine.spec.overhead)
        else:
            self._soon(self._generation_failed, sent, True, life)

    def _prefill(self, engine: SimulatedEngine, generation: Generation, life: int) -> None:
        if life == self._life:
            if engine.alive:
                engine.prefill(generation)
            else:
                generation.failed()

    def _prefilled(self, sent: _Sent, generation: Generation, life: int) -> None:
        assert self._plan is not None
        if life == self._life and self._plan.path.combined:
            self._first = self._world.clock.now - self._arrival
            self._world.lessons.began(sent.leg, self._job, sent.ahead, self._world.clock.now - self._since(sent))

    def _last(self, sent: _Sent, generation: Generation, life: int) -> None:
        """The last token of this engine: of the answer, or of a prefill alone."""
        if life != self._life:
            return
        lessons, now = self._world.lessons, self._world.clock.now
        assert self._plan is not None
        if sent.leg.role is Role.PREFILL:
            usage = {"prompt_tokens": generation.prompt, "prompt_tokens_details": {"cached_tokens": generation.cached}}
            lessons.prefilled(sent.leg, self._job, {}, sent.ahead, now - self._since(sent), usage)
            self._succeeded(sent)
            self._hand_over(sent, generation)
        else:
            lessons.answered(sent.leg, self._job, {}, generation.output - 1, now - self._arrival - self._first)
            self._succeeded(sent)
            self._end(None)

    def _since(self, sent: _Sent) -> float:
        """When its prefill could begin: it was sent, and all embeddings were there."""
        return max(sent.began, self._ready)

    def _hand_over(self, sent: _Sent, prefilled: Generation) -> None:
        """The KV of its prompt to the engine that decodes."""
        world = self._world
        assert self._plan is not None
        leg = self._plan.leg(Role.DECODE)
        to = leg.instance.url
        engine = world.park.engines[to]
        link = world.kv_link(sent.leg.instance.url, to)
        seconds = link.seconds(prefilled.prompt * engine.spec.language.kv_bytes, 1)
        life = self._life
        world.inlets[to].serve(seconds, world.clock.after, link.latency, self._decode, leg, engine, prefilled, life)

    def _decode(self, leg: Leg, engine: SimulatedEngine, prefilled: Generation, life: int) -> None:
        if life != self._life:
            return
        sent = self._sent(leg)
        if not engine.alive:
            self._generation_failed(sent, True, life)
            return

        def first(generation: Generation) -> None:
            self._first = self._world.clock.now - self._arrival

        engine.decode(
            Generation(
                prefilled.parts,
                prefilled.output,
                first,
                lambda generation: self._last(sent, generation, life),
                lambda: self._generation_failed(sent, False, life),
            )
        )

    def _generation_failed(self, sent: _Sent, refused: bool, life: int) -> None:
        """Prefill and decode go elsewhere, with the embeddings that encoders hold; not once something is answered."""
        self._failed(sent, refused)
        if life != self._life:
            return
        world, plan, error = self._world, self._plan, _error(sent.leg, refused)
        assert plan is not None
        self._tried.add(sent.leg.instance.url)
        self._attempts += 1
        drawn = None
        if self._first != self._first and self._attempts < ATTEMPTS:
            drawn = world.planner.redraw(plan, self._job, world.clock.now, self._tried, self._holds)
        if drawn is None:
            self._end(error)
            return
        self._life += 1
        self._plan = drawn
        self._generation = None
        self._arrived.clear()
        for share in self._shares:
            self._send(share)
        waits = bool(self._shares or self._encoding)
        if not waits or world.park.engines[reader(drawn).url].spec.overlap:
            self._generate()

    # ---- legs

    def _sent(self, leg: Leg) -> _Sent:
        used = self._world.results.used
        used[leg.instance.url] = used.get(leg.instance.url, 0) + 1
        return _Sent(leg, ahead(leg), self._world.clock.now)

    def _succeeded(self, sent: _Sent) -> None:
        if sent.leg.hold is not None:
            sent.leg.hold.succeeded()
            sent.leg.hold.close()

    def _failed(self, sent: _Sent, refused: bool) -> None:
        if sent.leg.hold is not None:
            sent.leg.hold.failed(_error(sent.leg, refused), self._world.clock.now)
            sent.leg.hold.close()

    def _soon(self, call: Callable[..., None], *arguments: object, seconds: float = 0.0) -> None:
        self._world.clock.after(seconds, call, *arguments)

    def _end(self, error: ProxyError | None) -> None:
        world, generation, plan = self._world, self._generation, self._plan
        self._holds.close()
        self._life += 1
        self._encodes = False
        self._generation = None  # it knows this course, too
        e2e = world.clock.now - self._arrival
        more = self._request.output_tokens - 1
        row = (
            self._arrival,
            float(error is None),
            float(len(self._media)),
            float(self._hits + (0 if generation is None else generation.hits)),
            self._encoded,
            self._encode_wait,
            max(0.0, self._ready - self._arrival - self._encoded),
            0.0 if generation is None else max(0.0, generation.begun - self._ready),
            self._first,
            (e2e - self._first) / more if more > 0 else nan,
            e2e,
            float(self._attempts),
            self._decision,
        )
        world.results.add("" if plan is None else plan.path.label, row)
        if error is not None:
            world.results.errors.append(f"{error.code}: {error.message}")


def _error(leg: Leg, refused: bool) -> EngineFailed:
    kind = Unreachable if refused else Broken
    return kind(f"{leg.instance.netloc} was killed", stage=STAGES[leg.role])
