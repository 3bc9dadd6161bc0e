"""The encode stage of one request: all its encoders at once, failed items alone to others, slow ones hedged.

Handles that are there are kept whatever happens to other items. Prefill and decode are not known here.

    call ─▶ announced ─▶ done      where the reader can wait for embeddings: handles are there from `announced` on, and
     │          └─ failed ─▶ the whole attempt fails: its reader was promised what does not come
     └─ failed ─▶ elsewhere
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from proxy.core import Body, Handle, Instance, Item, Job, Leg, Plan, Stage
from proxy.errors import ProxyError, Refused
from proxy.hedge import Hedge
from proxy.legs import Legs
from proxy.lessons import ahead
from proxy.planning.plan import Holds, Planner, reader
from proxy.record import LegRecord
from proxy.retry import cause, fetching, rule
from proxy.tasks import race, together

Handles = dict[int, Handle]


@dataclass(slots=True)
class Encoded:
    """What has become of a request's items.

    handles: by item index. failure: why some items have none, where the caller said that it can do without.
    beside: where encoders may go on with what they have announced; an error of theirs is raised there. None: nobody is
    to announce anything. going: what does. broken: something that was announced will not come. whole: all embeddings
    are there; known once `settle` was called.
    """

    handles: Handles = field(default_factory=dict)
    failure: ProxyError | None = None
    beside: together | None = None
    going: list[asyncio.Task[None]] = field(default_factory=list)
    broken: bool = False
    whole: bool = True

    @property
    def busy(self) -> bool:
        """Whether something that was announced is still computed."""
        return any(not task.done() for task in self.going)

    async def finish(self, patience: float) -> None:
        """Until nothing goes on any more, `patience` seconds at the most."""
        if self.going:
            await asyncio.wait(self.going, timeout=patience)

    def settle(self) -> None:
        """Nothing goes on any more. What did is forgotten: a failed task's error has this object, in its traceback."""
        self.whole = not self.broken and not any(task.cancelled() for task in self.going)
        self.going.clear()
        self.beside = None


@dataclass(frozen=True, slots=True)
class Share:
    """Items on their way to one encoder: the `number`th attempt for them, after those at `tried`."""

    leg: Leg
    reader: Instance  # of the embeddings
    tried: Collection[str] = frozenset()
    number: int = 1

    @property
    def tail(self) -> str:
        """The request id's end, behind the first item's index: unique among the calls of one request."""
        return "" if self.number == 1 else f"-{self.number}"


class Encoding:
    """`attempts`: at the most, per item."""

    def __init__(self, legs: Legs, planner: Planner, hedge: Hedge, attempts: int) -> None:
        self._legs = legs
        self._planner = planner
        self._metrics = legs.metrics
        self._lessons = legs.lessons
        self._hedge = hedge
        self._attempts = attempts

    async def run(self, plan: Plan, job: Job, spare: bool, found: Encoded) -> None:
        """Find the handles of every item of `job`. One that cannot be encoded is left out if `spare`, else its error
        raised. A client's mistake is raised either way, and the first error cancels everything else.
        """
        whom = reader(plan)
        if not self._legs.speaker(whom).awaits():
            found.beside = None
        async with together() as group:
            for leg in plan.encodes:
                group.create_task(self._share(Share(leg, whom), job, found, spare))
        by_identity = {
            item.identity: found.handles[item.index]
            for leg in plan.encodes
            for item in leg.items
            if item.index in found.handles
        }
        found.handles = {i.index: by_identity[i.identity] for i in job.items if i.identity in by_identity}

    async def _share(self, share: Share, job: Job, found: Encoded, spare: bool) -> None:
        """Encode a share into `found`; if that fails, each of its items alone elsewhere."""
        try:
            found.handles.update(await self._hedged(share, job, found))
        except ProxyError as error:
            error.attempts = share.number
            if not rule(error).elsewhere:
                raise
            async with together() as group:
                for item in share.leg.items:
                    group.create_task(self._alone(item, share, job, error, found, spare))

    async def _alone(self, item: Item, share: Share, job: Job, error: ProxyError, found: Encoded, spare: bool) -> None:
        tried = {*share.tried, share.leg.instance.url}
        with Holds() as holds:
            leg = self._another(share, (item,), holds) if share.number < self._attempts else None
            if leg is not None:
                self._metrics.retries.labels(Stage.ENCODE).inc()
                job.record.note(self._legs.clock(), "retry", f"encode: {cause(error)}, goes to {leg.instance.netloc}")
                await self._share(Share(leg, share.reader, tried, share.number + 1), job, found, spare)
            elif spare:
                found.failure = error
            else:
                try:
                    raise error
                finally:
                    del error  # its traceback has this frame, which would hold it in turn

    def _another(self, share: Share, items: tuple[Item, ...], holds: Holds) -> Leg | None:
        """For some of a share's items, where none of them has been."""
        tried = {*share.tried, share.leg.instance.url}
        return self._planner.encoder(items, self._legs.clock(), tried, share.reader.dialect, holds)

    async def _hedged(self, share: Share, job: Job, found: Encoded) -> Handles:
        """One attempt, or two where the first is slow and another encoder is there; the loser is cancelled."""
        delay = self._hedge.delay()
        if delay is None and found.beside is not None and share.number == 1:
            return await self._ahead(share, found.beside, job, found)
        with Holds() as holds:
            if delay is None:
                return await self._attempt(share, share.leg, "", job)

            async def beside(leg: Leg) -> Handles:
                self._metrics.hedges.inc()
                job.record.note(self._legs.clock(), "hedge", leg.instance.netloc)
                return await self._attempt(share, leg, "-h", job)

            return await race(
                self._attempt(share, share.leg, "", job),
                lambda: None if (leg := self._another(share, share.leg.items, holds)) is None else beside(leg),
                delay,
                ProxyError,
            )

    async def _ahead(self, share: Share, beside: together, job: Job, found: Encoded) -> Handles:
        """The handles of one attempt as soon as they are known; `beside` sees to it that their embeddings come."""
        known: asyncio.Future[Handles | None] = asyncio.get_running_loop().create_future()
        failures: list[ProxyError] = []  # emptied: an error's traceback has this list, which must not have it in turn

        def announce(handles: Handles) -> None:
            if not known.done():
                known.set_result(handles)

        async def attempt() -> None:
            try:
                announce(await self._attempt(share, share.leg, "", job, announce))
            except ProxyError as error:
                if known.done():
                    found.broken = True
                    raise
                failures.append(error)
                known.set_result(None)

        task = beside.create_task(attempt())
        try:
            handles = await known
        except BaseException:
            task.cancel()
            raise
        if handles is None:
            raise failures.pop()
        found.going.append(task)
        return handles

    async def _attempt(
        self, share: Share, leg: Leg, beside: str, job: Job, announce: Callable[[Handles], None] | None = None
    ) -> Handles:
        before = ahead(leg)
        try:
            with self._legs.judged(leg, job.record) as part:
                part.attempt = share.number
                found = await self._calls(share, leg, part, beside, job, announce)
        except ProxyError:
            self._lessons.lost([leg])
            raise
        finally:
            if leg.hold is not None:
                leg.hold.close()
        for handle in found.values():
            cached = handle.entry.get("cached")
            part.hits += cached is True
            part.misses += cached is False
        seconds = part.ended - part.began
        self._hedge.observe(seconds)
        self._lessons.encoded(leg, found, before, seconds)
        return found

    async def _calls(
        self,
        share: Share,
        leg: Leg,
        part: LegRecord,
        beside: str,
        job: Job,
        announce: Callable[[Handles], None] | None,
    ) -> Handles:
        """All items of a leg: one call, or several at once where the family wants that."""
        first, *others = self._legs.dialect(leg).batches(leg.items)
        if not others:
            return await self._call(share, leg, part, first, beside, job, announce)
        async with together() as group:
            tasks = [group.create_task(self._call(share, leg, part, batch, beside, job)) for batch in (first, *others)]
        return {index: handle for task in tasks for index, handle in task.result().items()}

    async def _call(
        self,
        share: Share,
        leg: Leg,
        part: LegRecord,
        items: Sequence[Item],
        beside: str,
        job: Job,
        announce: Callable[[Handles], None] | None = None,
    ) -> Handles:
        dialect, name = self._legs.dialect(leg), f"{job.id}:{items[0].index}{share.tail}{beside}"
        try:
            body = dialect.encode(job, items)
            if told := self._legs.speaker(share.reader).expects(items, secrets.randbits(63)):
                body = {**body, **told}
            known = None
            if announce is not None:
                body = {**body, **self._legs.speaker(share.reader).awaits()}

                def known(reply: Body) -> None:
                    part.first = self._legs.clock()
                    announce(dialect.read_encode(items, reply))

            with fetching(items if dialect.vague else ()):
                reply = await self._legs.call(leg, part, body, job, name, self._legs.timeouts.encode, known)
        except Refused as error:
            error.param = dialect.blame(items, error.param)
            raise
        return dialect.read_encode(items, reply)
