"""Runs a request: when each leg is sent, what cancels what, where it goes on after a failure, what the client gets.

Chooses no path and no instance (`plan`), and does not judge failures (`retry`). The three orders of prefill and decode
are coded once, here. Every leg runs inside the request's own task, so that one cancellation (the client left, a
deadline, shutdown) ends all of them, and all that was held is returned on the way out.

    admitted ▸ plan ▸ encode ▸ prefill and decode ──▶ client
                         ▲          │ failed before the first byte: elsewhere, under a new id
                         └──────────┘ failed after it: told, or (--resume) continued where that is exact
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from proxy import relay
from proxy.callbacks import Metaserver, PrefillCall
from proxy.core import BOTH, Body, Job, Leg, Order, Plan, Role, Stage
from proxy.encoding import Encoded, Encoding, Handles
from proxy.errors import DeadlineExceeded, GaveUp, NoInstance, ProxyError
from proxy.intake import wishes
from proxy.intake.gate import Gate
from proxy.legs import Legs
from proxy.lessons import ahead, generated, prompted
from proxy.planning.candidates import NOBODY
from proxy.planning.plan import Holds, Planner, reader
from proxy.record import LegRecord, Record
from proxy.relay import Sink
from proxy.resume import Tape, TapedSink
from proxy.retry import STAGES, Cause, cause, culprit, fetching, rule, unread
from proxy.sse import DONE
from proxy.tasks import together
from proxy.upstream import Post

log = logging.getLogger(__name__)

_PREFILL_LAG_S = 1.0  # a prefill engine may answer after decode has
_ENCODE_LAG_S = 1.0  # an encoder may say that it is done after all has been answered
_RETRY_AFTER_S = 1.0  # where every engine is busy and none says for how long


@dataclass(frozen=True, slots=True)
class Rules:
    """What the flags of the same names say."""

    max_attempts: int = 3
    resume: bool = False
    request_timeout: float | None = None


Over = Callable[[Plan, Job, Sink, Callable[[Sink], Coroutine[Any, Any, None]]], Awaitable[None]]
"""Runs the generation of an attempt with media, into its sink or one before it; may refuse it, or end it early."""


@dataclass(slots=True)
class Run:
    """What the dispatcher knows of a request on its way; what it did is in `record`."""

    job: Job
    sink: Sink
    record: Record
    plan: Plan | None = None
    tried: set[str] = field(default_factory=set)  # URLs whose legs of this request failed
    call: Post | None = None  # the leg that answers
    handles: Handles | None = None  # of the present plan's items; None: they are not encoded yet
    encoded: Encoded = field(default_factory=Encoded)  # by the present attempt
    _told: tuple[Plan | None, str] | None = None  # a plan and its receipt
    encode_ended: float = 0.0
    decode_began: float = 0.0
    prompt_tokens: int = 0  # as the engine has counted them; 0: it did not tell
    tokens: float = 0.0  # of the answer, but for a stream's first; 0: nobody could tell
    handoff: Mapping[str, Any] | None = None  # prefilled KV that nobody has fetched yet
    tape: Tape | None = None  # of an answer that could be continued
    prefilling: int = 0  # prefills that the decode engine waits for now
    gains: int = 0  # attempts that another goes on from, because their engine gave up
    out: Sink | None = None  # where the present attempt's answer goes

    @property
    def begun(self) -> bool:
        """Whether the present attempt has answered something."""
        return self.out is not None and self.out.started

    @property
    def route(self) -> str:
        """The route receipt of `plan`."""
        if self._told is None or self._told[0] is not self.plan:
            self._told = self.plan, str(self.plan or "")
        return self._told[1]

    def headers(self) -> dict[str, str]:
        """The route receipt and the durations known by now."""
        found = {} if self.plan is None else {"x-triptych-route": self.route}
        if timings := self.record.timings:
            found["Server-Timing"] = ", ".join([f"{name};dur={s * 1000:.1f}" for name, s in timings.items()])
        return found


class Dispatcher:
    """One for the whole proxy; all that belongs to one request is in its Run."""

    def __init__(
        self,
        planner: Planner,
        legs: Legs,
        encoding: Encoding,
        metaserver: Metaserver,
        gate: Gate,
        rules: Rules,
        over: Over | None = None,
    ) -> None:
        self._over = over
        self._planner = planner
        self._legs = legs
        self._metaserver = metaserver
        self._encoding = encoding
        self._gate = gate
        self._rules = rules
        self._metrics = legs.metrics
        self._lessons = legs.lessons
        self._timeouts = legs.timeouts
        self._clock = legs.clock

    def begin(self, job: Job, sink: Sink) -> Run:
        record = job.record
        record.began, record.api, record.model = self._clock(), job.api, job.model
        record.stream, record.items, record.received = job.stream, len(job.items), job.nbytes
        return Run(job, sink, record)

    def end(self, run: Run, status: int) -> Record:
        """The record of a request that has ended, with all that is known of it."""
        record = run.record
        record.ended, record.status, record.sent = self._clock(), status, run.sink.sent
        if run.plan is not None:
            record.path, record.route, record.reason = run.plan.path.label, run.route, run.plan.reason
            record.prompt_tokens = run.prompt_tokens or run.job.prompt_tokens
            record.output_tokens = int(run.tokens) + run.job.stream if run.tokens else 0
        return record

    async def run(self, run: Run) -> None:
        """Serve the request to its end. Raises ProxyError, with attempts counted.

        Once `run.sink.started` is true, an error can only be told as the stream's last event.
        """
        seconds = wishes.seconds(run.job) or self._rules.request_timeout
        if seconds is None:
            await self._admitted(run)
        else:
            await self._within(seconds, run)

    async def _within(self, seconds: float, run: Run) -> None:
        """Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout(seconds) as timer:
                await self._admitted(run)
        except TimeoutError:
            if not timer.expired():
                raise
            error = DeadlineExceeded(f"the request was not finished within {seconds:g} s")
            error.attempts = max(1, run.record.attempts)
            raise error from None

    async def _admitted(self, run: Run) -> None:
        entry = await self._gate.enter(run.job)
        run.record.admitted = self._clock()
        holds = Holds()
        try:
            await self._serve(run, holds)
        finally:
            holds.close()
            self._gate.leave(entry)

    # ---- the ladder

    async def _serve(self, run: Run, holds: Holds) -> None:
        record = run.record
        plan = run.plan = self._planner.draw(run.job, record.admitted, holds)
        record.drawn = self._clock()
        if plan.lacks:
            self._metrics.fallbacks.labels(f"no_{plan.lacks}").inc()
        run.tape = self._tape(run.job, plan)
        run.handles = None if plan.encodes else {}
        while True:
            record.attempts += 1
            job = _attempt(run)
            try:
                if run.handles is None:
                    await self._encode_first(run, plan, job, holds)
                else:
                    await self._attend(run, plan, job, run.handles)
                return
            except ProxyError as error:
                error.attempts = max(error.attempts, record.attempts)
                if run.handles is None and not run.encoded.broken:
                    raise  # encoding has a ladder of its own
                if run.sink.started and self._closed(run):
                    return
                assert run.plan is not None
                plan, handles = run.plan, run.handles or {}
                role = Role.ENCODE if run.encoded.broken else culprit(error, plan.path)
                doubt = self._doubt(run, plan, role, error, handles)
                before, plan = plan, self._mend(run, plan, role, error, doubt, holds)
                run.plan = plan
                error.settle()
                again = role is Role.ENCODE or not run.encoded.whole
                run.handles = None if again else self._kept(before, plan, role, handles)
            log.info("%s goes on elsewhere: %s", job.id, plan)

    async def _encode_first(self, run: Run, plan: Plan, job: Job, holds: Holds) -> None:
        """Encode, then attend; what encoders have only announced, the first time, is computed beside that."""
        found = run.encoded = Encoded()
        try:
            async with together() as group:
                found.beside = group if run.record.attempts == 1 else None
                plan, run.handles = await self._encode(run, plan, job, holds, group)
                await self._attend(run, plan, job, run.handles)
                await found.finish(_ENCODE_LAG_S)
                for task in found.going:
                    task.cancel()
        finally:
            found.settle()

    async def _attend(self, run: Run, plan: Plan, job: Job, handles: Handles) -> None:
        """Prefill, decode and answer."""
        run.out = run.sink if run.tape is None else TapedSink(run.sink, run.tape)
        if self._over is None or not job.items:
            await self._generate(run, plan, job, handles)
        else:
            await self._over(plan, job, run.out, partial(self._into, run, plan, job, handles))

    def _doubt(self, run: Run, plan: Plan, role: Role, error: ProxyError, handles: Handles) -> bool:
        """Whether the same engine may do better with what it got from others made anew: the media, the KV."""
        if run.record.attempts > 1 or cause(error) is not Cause.SERVER_ERROR or role is Role.ENCODE:
            return False
        dialect = self._legs.dialect(plan.leg(role))
        return dialect.vague and ((bool(handles) and dialect.media_instead) or role is Role.DECODE)

    def _kept(self, before: Plan, plan: Plan, role: Role, handles: Handles) -> Handles:
        """The handles for another attempt, after `role` of the plan `before` failed: they may have been the reason, or
        lead to an engine that has no part any more."""
        same = role is Role.DECODE and reader(before) is reader(plan)
        return handles if same or not self._legs.speaker(reader(plan)).media_instead else {}

    def _mend(self, run: Run, plan: Plan, role: Role, error: ProxyError, doubt: bool, holds: Holds) -> Plan:
        """The plan for another attempt after `error` of an instance with `role`. Raises `error` if there is none."""
        verdict, now = rule(error), self._clock()
        goes_on = run.tape is not None and run.tape.usable(error)
        if run.tape is not None and goes_on and isinstance(error, GaveUp):
            run.gains += run.tape.gained
        drawn = None
        may_go_on = goes_on or not run.sink.started
        if verdict.elsewhere and may_go_on and run.record.attempts - run.gains < self._rules.max_attempts:
            drawn = self._redrawn(run, plan, role, verdict.again or doubt, now, holds)
        if drawn is None:
            if cause(error) is Cause.BUSY and error.retry_after is None:
                error.retry_after = _RETRY_AFTER_S
            raise error
        if drawn.path is not plan.path:
            self._metrics.fallbacks.labels(cause(error)).inc()
        if role is not Role.DECODE or not unread(error) or Role.DECODE not in drawn.path.roles:
            run.handoff = None
        self._metrics.retries.labels(STAGES[role]).inc()
        run.record.note(now, "resume" if goes_on else "retry", f"{STAGES[role]}: {cause(error)}, goes on at {drawn}")
        if run.tape is not None:
            run.tape.cut(goes_on)
            self._metrics.resumes.inc(goes_on)
        return drawn

    def _tape(self, job: Job, plan: Plan) -> Tape | None:
        """None where the answer may pass unread."""
        leg = plan.leg(BOTH if plan.path.combined else Role.DECODE)
        dialect = self._legs.dialect(leg)
        if not self._rules.resume and (dialect.given_up is None or leg.role is not Role.DECODE):
            return None
        tape = Tape(job, dialect, self._rules.resume)
        return tape if tape.needed else None

    def _redrawn(self, run: Run, plan: Plan, role: Role, again: bool, now: float, holds: Holds) -> Plan | None:
        if role is Role.ENCODE and not plan.encodes:
            return None
        if role is not Role.ENCODE:
            run.tried.add(plan.leg(role).instance.url)
        if role is Role.ENCODE or not run.encoded.whole:
            try:
                plan = self._planner.encode_again(plan, run.job, now, holds)
            except NoInstance:
                return None
        drawn = self._planner.redraw(plan, run.job, now, run.tried, holds)
        if drawn is None and again:
            drawn = self._planner.redraw(plan, run.job, now, NOBODY, holds)
        return drawn

    def _closed(self, run: Run) -> bool:
        """End a stream that lost nothing but its end."""
        if run.tape is None or not run.tape.complete(run.job):
            return False
        run.sink.write(b"data: " + DONE + b"\n\n")
        run.sink.end()
        return True

    async def _encode(self, run: Run, plan: Plan, job: Job, holds: Holds, group: together) -> tuple[Plan, Handles]:
        """All items' handles; or fewer, and a plan whose engine encodes the others itself."""
        began, found = self._clock(), run.encoded
        await self._encoding.run(plan, job, self._planner.can_inline(plan, began), found)
        if found.going:
            found.going.append(group.create_task(self._encoded(run, tuple(found.going), began)))
        else:
            self._timed(run, "encode", began)
        if found.failure is not None:
            log.warning("%s is encoded inline: %s", job.id, found.failure.told)
            inline = self._planner.inline(plan, job, self._clock(), holds)
            if inline is None:
                raise found.failure
            plan = run.plan = inline
            self._metrics.fallbacks.labels(cause(found.failure)).inc()
            run.record.note(self._clock(), "fallback", f"encode: {cause(found.failure)}, encoded inline")
        return plan, found.handles

    async def _encoded(self, run: Run, going: Collection[asyncio.Task[None]], began: float) -> None:
        await asyncio.wait(going)
        self._timed(run, "encode", began)
        run.encode_ended = self._clock()

    async def _into(self, run: Run, plan: Plan, job: Job, handles: Handles, sink: Sink) -> None:
        run.out = sink
        await self._generate(run, plan, job, handles)

    async def _generate(self, run: Run, plan: Plan, job: Job, handles: Handles) -> None:
        if plan.path.combined:
            leg = plan.leg(BOTH)
            await self._answer(run, leg, self._legs.dialect(leg).whole(job, handles), job)
        else:
            order = self._legs.dialect(plan.leg(Role.PREFILL)).order
            if order is Order.SEQUENTIAL:
                await self._sequential(run, plan, job, handles)
            elif order is Order.TOGETHER:
                await self._together(run, plan, job, handles)
            else:
                await self._decode_first(run, plan, job, handles)

    # ---- the three orders of prefill and decode

    async def _sequential(self, run: Run, plan: Plan, job: Job, handles: Handles) -> None:
        prefill, decode = plan.leg(Role.PREFILL), plan.leg(Role.DECODE)
        if run.handoff is None:
            with self._legs.judged(prefill, run.record) as part:
                reply = await self._prefill(run, prefill, part, job, handles, None)
                run.handoff = self._legs.dialect(prefill).read_prefill(reply)
        await self._answer(run, decode, self._legs.dialect(decode).decode(job, handles, run.handoff, ""), job)

    async def _together(self, run: Run, plan: Plan, job: Job, handles: Handles) -> None:
        prefill, decode = plan.leg(Role.PREFILL), plan.leg(Role.DECODE)
        handoff = self._legs.dialect(prefill).rendezvous(job, secrets.randbits(63))
        body = self._legs.dialect(decode).decode(job, handles, handoff, "")
        try:
            async with together() as group:
                task = group.create_task(self._prefill_beside(run, prefill, job, handles, handoff))
                await self._answer(run, decode, body, job, patient=True)
                await asyncio.wait([task], timeout=_PREFILL_LAG_S)
                task.cancel()  # the client has its answer
        except BaseException:
            await self._abort(job, prefill, decode)
            raise

    async def _prefill_beside(self, run: Run, leg: Leg, job: Job, handles: Handles, handoff: Mapping[str, Any]) -> None:
        try:
            with self._legs.judged(leg, run.record) as part:
                await self._prefill(run, leg, part, job, handles, handoff)
        except ProxyError as error:
            if not run.begun:
                raise
            log.warning("%s: prefill failed after decode had begun to answer: %s", job.id, error.told)
        if not run.begun:
            run.decode_began = self._clock()
        self._patience(run, self._first_answer(job))

    async def _abort(self, job: Job, prefill: Leg, decode: Leg) -> None:
        async with together() as group:
            for leg, stage in ((prefill, Stage.PREFILL), (decode, Stage.DECODE)):
                group.create_task(self._legs.abort(leg, stage, job))

    async def _decode_first(self, run: Run, plan: Plan, job: Job, handles: Handles) -> None:
        prefill, decode = plan.leg(Role.PREFILL), plan.leg(Role.DECODE)
        dialect = self._legs.dialect(decode)
        url = await self._metaserver.url_for(decode.instance)
        body, count = dialect.decode(job, handles, None, url), dialect.prefills(job)
        places = await self._metaserver.places(decode.instance, dialect.remote_prefills, count, self._timeouts.prefill)
        with places, self._metaserver.expect(job.id, count) as waiting:

            async def attend(group: together) -> None:
                while True:
                    call = await waiting.call()
                    group.create_task(self._prefill_on_call(run, call, prefill, job, handles)).add_done_callback(
                        lambda _: places.leave()
                    )

            async with together() as group:
                attending = group.create_task(attend(group))
                await self._answer(run, decode, body, job)
                attending.cancel()  # the decode engine has no need of more

    async def _prefill_on_call(self, run: Run, call: PrefillCall, leg: Leg, job: Job, handles: Handles) -> None:
        self._patience(run, None)  # the prefill has a deadline of its own
        run.prefilling += 1
        work = self._judged_prefill(run, leg, job, handles, call.descriptor)
        try:
            await (self._metaserver.owed.finish(work) if self._legs.dialect(leg).owes_prefill else work)
        except ProxyError as error:
            call.finish(error)
            if not (run.begun and call.alone):
                raise  # the decode engine may wait for it for ever: it is hung up on
            log.warning("%s: prefill failed after decode had begun to answer: %s", job.id, error.told)
        finally:
            run.prefilling -= 1
        call.finish(None)
        if not run.begun:
            run.decode_began = self._clock()
        if not run.prefilling:
            self._patience(run, self._first_answer(job))

    async def _judged_prefill(
        self, run: Run, leg: Leg, job: Job, handles: Handles, descriptor: Mapping[str, Any]
    ) -> None:
        with self._legs.judged(leg, run.record) as part:
            await self._prefill(run, leg, part, job, handles, descriptor)

    async def _prefill(
        self,
        run: Run,
        leg: Leg,
        part: LegRecord,
        job: Job,
        handles: Handles,
        descriptor: Mapping[str, Any] | None,
    ) -> Body:
        began, before = part.began, ahead(leg)
        dialect = self._legs.dialect(leg)
        body = dialect.prefill(job, handles, descriptor)
        if headers := dialect.headers(descriptor):
            job = job.with_headers(headers)
        with fetching(job.items if dialect.vague else ()):
            reply = await self._legs.call(leg, part, body, job, job.id, self._timeouts.prefill)
        self._timed(run, "prefill", began)
        if not run.encoded.busy:
            seconds = self._clock() - max(began, run.encode_ended)
            self._lessons.prefilled(leg, job, handles, before, seconds, reply.get("usage"))
        if dialect.prefills(job) == 1:
            _prefilled(leg)
        return reply

    # ---- the leg whose answer is the client's

    async def _answer(self, run: Run, leg: Leg, body: Body, job: Job, patient: bool = False) -> None:
        """`patient`: until `_patience` says how long the first byte may take."""
        record = run.record

        def head() -> Mapping[str, str]:
            part.first = self._clock()
            _prefilled(leg)
            if not run.sink.started:
                self._timed(run, "ttft", record.began)
                record.first = part.first
            return run.headers()

        assert run.out is not None
        before = ahead(leg)
        with self._legs.judged(leg, record) as part, fetching(job.items if self._legs.dialect(leg).vague else ()):
            run.decode_began = part.began
            seconds = None if patient else self._first_answer(job)
            run.call = self._legs.post(leg, part, body, job, job.id, seconds)
            async with run.call as answer:
                if job.stream:
                    tokens = await relay.stream(answer, run.out, head, Stage.DECODE, self._timeouts.stream_idle)
                    usage, since = None, part.first
                else:
                    usage = (await relay.whole(answer, run.out, head, Stage.DECODE)).get("usage")
                    tokens, since = generated(usage), run.decode_began
                    run.prompt_tokens = prompted(usage)
        self._timed(run, "decode", run.decode_began)
        if job.stream and leg.role is BOTH:
            self._lessons.began(leg, job, before, part.first - max(run.decode_began, run.encode_ended))
        run.tokens = tokens
        self._lessons.answered(leg, job, run.handles or {}, tokens, self._clock() - since, usage)

    def _first_answer(self, job: Job) -> float:
        return self._timeouts.first_token if job.stream else self._timeouts.answer

    def _patience(self, run: Run, seconds: float | None) -> None:
        """How long the answering leg may take from now to its first byte; nothing changes once that is there."""
        if run.call is not None and not run.begun:
            run.call.patience(seconds)

    def _timed(self, run: Run, stage: str, began: float) -> None:
        seconds = run.record.timings[stage] = self._clock() - began
        self._metrics.observe(stage, seconds)


def _prefilled(leg: Leg) -> None:
    if leg.hold is not None:
        leg.hold.prefilled()


def _attempt(run: Run) -> Job:
    """The job as this attempt's engines get it. One that still holds an earlier attempt must not take this for it."""
    number = run.record.attempts
    job = run.job if number == 1 else replace(run.job, id=f"{run.job.id}-{number}")
    return job if run.tape is None else run.tape.asking(job)
