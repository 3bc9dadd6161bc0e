"""Puts a language engine's own encoder before its prompts: media of a request are encoded here, and lent to prefill.

    body with media ─▶ a loan per item ─ its place is known ─▶ body with `image_embeds`, entries are the loans
                              └─ forward (the encoder's thread) ─▶ rows, read in place ─ prefilled ─▶ given back
    body with handles of the encoder's own ─▶ a loan for each: they are not fetched either

An embedding is pinned in the encoder's cache while it is lent, and stays there afterwards as long as there is room:
what comes again is not computed again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import torch

from engines.encoder.cache import Entry
from engines.encoder.request import OTHER_MEDIA, TAKEN, MediaItem, answer, parse
from engines.encoder.service import Encoder
from engines.errors import BadRequest, DeadlineExceeded, EngineError, Overloaded

MEDIA = OTHER_MEDIA | TAKEN.keys() | {"image", "input_image"}
"""Types of parts that the encoder is to judge; what it does not take it refuses with the reason."""

EXTRAS = ("mm_processor_kwargs", "media_io_kwargs")
FULL = "cache_full"
POLL = 0.02  # seconds


class Loan:
    """An embedding of our encoder, for one request. An `engines.language.embeddings.Loan`."""

    def __init__(self, encoder: Encoder, found: Coroutine[Any, Any, Entry], on_end: Callable[[Loan], None]) -> None:
        """`found`: the entry, pinned. `over` is set and `on_end` called once it is given back and holds nothing."""
        self.over = asyncio.Event()
        self._encoder = encoder
        self._on_end = on_end
        self._task = asyncio.create_task(found)  # noqa: TID251 - ends in `release`
        self._released = False

    async def rows(self) -> torch.Tensor:
        return self._encoder.rows(await asyncio.shield(self._task))

    def release(self) -> None:
        """Nothing is read any more: an embedding that nobody else waits for need not be computed."""
        if not self._released:
            self._released = True
            self._task.cancel()
            self._task.add_done_callback(self._give_back)

    def _give_back(self, task: asyncio.Task[Entry]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._return(task.result())
        self.over.set()
        self._on_end(self)

    def _return(self, entry: Entry) -> None:
        self._encoder.cache.was_read(entry)  # in the place of the reader that its handle was for
        self._encoder.release(entry)


class Encoding(Loan):
    """One that the request brought as media."""

    def __init__(self, encoder: Encoder, item: MediaItem, on_end: Callable[[Loan], None]) -> None:
        super().__init__(encoder, self._encode(), on_end)
        self.item = item
        self._placed: asyncio.Future[tuple[Entry, bool]] = asyncio.get_running_loop().create_future()

    async def place(self) -> tuple[Entry, bool]:
        """Where the embedding is or will be, and whether it was there already. Raises EngineError."""
        await asyncio.wait((self._task, self._placed), return_when=asyncio.FIRST_COMPLETED)
        if not self._placed.done():
            await self._task
        return self._placed.result()

    def _place(self, entry: Entry, cached: bool) -> None:
        if not self._placed.done():
            self._placed.set_result((entry, cached))

    async def _encode(self) -> Entry:
        limit = self._encoder.settings.encode_timeout
        try:
            async with asyncio.timeout(limit):
                return await self._encoder.encode(self.item, self._place)
        except TimeoutError:
            message = f"not encoded within {limit:g} s (--encode-timeout)"
            failure: EngineError = DeadlineExceeded(message, code="encode_timeout")
        except EngineError as error:
            failure = error
        self._encoder.metrics.failed(failure.code)
        told = failure.at(self.item.param)
        told.stage = told.stage or "encode"
        raise told

    def _give_back(self, task: asyncio.Task[Entry]) -> None:
        if task.cancelled() and self._placed.done():
            self._encoder.cache.not_named(self._placed.result()[0])
        super()._give_back(task)

    def _return(self, entry: Entry) -> None:
        self._encoder.cache.not_named(entry)
        self._encoder.release(entry)


class Crowded(Exception):
    """There was no room, and others had some of it. `returns`: loans that were over when it was looked for, and those
    of the request itself."""

    def __init__(self, failure: Overloaded, returns: int) -> None:
        super().__init__(str(failure))
        self.failure = failure
        self.returns = returns


class Lender:
    """What stands before the prompts of one language engine."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._lent: set[Loan] = set()  # of media
        self._turn = asyncio.Lock()  # whoever holds it waits for room, and goes before all that come later
        self._returns = 0  # loans that are over

    @asynccontextmanager
    async def lend(self, body: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
        """The body as this engine reads it, its media encoded or about to be, and what its handles name read in place
        where it is our encoder's. Raises EngineError, naming the item.

        Where the cache is full of what others have borrowed, it waits for them, --encode-timeout seconds at most. The
        end of the block takes back what has not been given back: nothing of it may be read any more.
        """
        named = self._named(body)
        try:
            if named:
                body = {**body, "ec_transfer_params": {**body["ec_transfer_params"], **named}}
            media = _media(body)
            if not media:
                yield body
                return
            loans, places = await self._encoded(parse(_asked(body, media), self._encoder.settings.max_items))
            try:
                yield _lent(body, media, loans, places)
            finally:
                _release(loans)
        finally:
            _release(named.values())

    def _named(self, body: Mapping[str, Any]) -> dict[str, Loan]:
        """Handles that our encoder gave: no others have the same places."""
        entries = body.get("ec_transfer_params")
        return {
            mm_hash: Loan(self._encoder, self._encoder.held(mm_hash), self._take_back)
            for mm_hash, entry in (entries.items() if isinstance(entries, Mapping) else ())
            if isinstance(entry, Mapping) and self._encoder.is_at(mm_hash, entry.get("where"))
        }

    async def _encoded(self, items: Sequence[MediaItem]) -> tuple[list[Encoding], list[tuple[Entry, bool]]]:
        await self._others_first()
        try:
            return await self._try(items)
        except Crowded as error:
            crowded = error
        with suppress(TimeoutError):
            async with asyncio.timeout(self._encoder.settings.encode_timeout), self._turn:
                while True:
                    while self._returns == crowded.returns and self._busy():  # noqa: ASYNC110 - flights tell nobody
                        await asyncio.sleep(POLL)
                    try:
                        return await self._try(items)
                    except Crowded as error:
                        crowded = error
        raise crowded.failure

    async def _others_first(self) -> None:
        """Until nobody waits for room who came before. Raises Overloaded."""
        limit = self._encoder.settings.encode_timeout
        try:
            async with asyncio.timeout(limit), self._turn:
                pass
        except TimeoutError:
            message = f"others wait for room for their embeddings, for {limit:g} s already; raise --cache-bytes"
            raise Overloaded(message, code=FULL) from None

    def _busy(self) -> bool:
        """Whether anything is lent, or written, perhaps for nobody any more."""
        return bool(self._lent or self._encoder.queue()["items"])

    async def _try(self, items: Sequence[MediaItem]) -> tuple[list[Encoding], list[tuple[Entry, bool]]]:
        """Where each will be; on an error, nothing is held. Raises Crowded and EngineError."""
        busy, returns = self._busy(), self._returns
        loans = [Encoding(self._encoder, item, self._take_back) for item in items]
        self._lent.update(loans)
        try:
            return loans, await _all(loans)
        except BaseException as error:
            _release(loans)
            await asyncio.gather(*(loan.over.wait() for loan in loans))
            returns += len(loans)
            others = busy or self._busy() or self._returns != returns
            if isinstance(error, Overloaded) and error.code == FULL and others:
                raise Crowded(error, returns) from None
            raise

    def _take_back(self, loan: Loan) -> None:
        self._lent.discard(loan)
        self._returns += 1


def _release(loans: Iterable[Loan]) -> None:
    for loan in loans:
        loan.release()


async def _all(loans: list[Encoding]) -> list[tuple[Entry, bool]]:
    """The places of all of them. Raises what no retry can mend rather than what a retry may."""
    places = await asyncio.gather(*(loan.place() for loan in loans), return_exceptions=True)
    failures = [place for place in places if isinstance(place, BaseException)]
    if failures:
        raise min(failures, key=lambda error: not isinstance(error, EngineError) or error.retryable)
    return [place for place in places if not isinstance(place, BaseException)]


def _media(body: Mapping[str, Any]) -> dict[tuple[int, int], Any]:
    """The parts that are media, by message and place in it, in reading order."""
    messages = body.get("messages")
    return {
        (number, index): part
        for number, message in enumerate(messages if isinstance(messages, list) else ())
        for index, part in enumerate(_content(message))
        if isinstance(part, Mapping) and part.get("type") in MEDIA
    }


def _content(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, Mapping) else None
    return content if isinstance(content, list) else []


def _asked(body: Mapping[str, Any], media: Mapping[tuple[int, int], Any]) -> dict[str, Any]:
    """What an encoder would be asked: media at the places where they stand, and nothing else."""
    messages = [
        {"content": [media.get((number, index), {"type": "text"}) for index in range(len(_content(message)))]}
        for number, message in enumerate(body["messages"])
    ]
    return {"messages": messages, **{name: body[name] for name in EXTRAS if name in body}}


def _lent(
    body: Mapping[str, Any], where: Iterable[tuple[int, int]], loans: list[Encoding], places: list[tuple[Entry, bool]]
) -> dict[str, Any]:
    """The body with what each item became in its place, and the loans among the entries, one for each content."""
    messages, entries = list(body["messages"]), _entries(body)
    for (number, index), loan, (entry, cached) in zip(where, loans, places, strict=True):
        told = answer("", "", 0, [loan.item], [(entry.key, entry.value, cached)])["ec_transfer_params"][entry.key]
        kind = f"{told['modality']}_embeds"
        content = list(messages[number]["content"])
        content[index] = {"type": kind, kind: told["metadata"], "uuid": entry.key}
        messages[number] = {**messages[number], "content": content}
        if entries.setdefault(entry.key, loan) is not loan:
            loan.release()
    return {**body, "messages": messages, "ec_transfer_params": entries}


def _entries(body: Mapping[str, Any]) -> dict[str, Any]:
    """Handles that came with the request. Raises BadRequest."""
    given = body.get("ec_transfer_params")
    if given is not None and not isinstance(given, Mapping):
        raise BadRequest("ec_transfer_params must be an object", param="ec_transfer_params")
    return dict(given or {})
