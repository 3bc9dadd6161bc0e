"""What a dialect must be able to say. Bodies in, bodies out: no HTTP, no waiting, no choice of instance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from proxy.core import Body, Handle, Item, Job, Order, Role

Handles = Mapping[int, Handle]
"""By item index: where each item's embedding is."""

Call = tuple[str, Body]
"""A path at an engine and what is posted there."""


class BadReply(ValueError):
    """A reply with a success status that does not hold what the next stage needs."""


class Media(StrEnum):
    """Whether prefill and decode get media whose embeddings an encoder has made."""

    AUTO = "auto"  # prefill does where an engine would not survive that the embedding is gone
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Options:
    """What flags say to every family."""

    order: Order | None = None  # of prefill and decode; None: the family's own
    media: Media = Media.AUTO


class Dialect(Protocol):
    """One engine family, as one instance of it is spoken to. Families subclass it, and say what differs.

    Every method returns a new body and leaves its arguments as they were; all are pure. Bodies keep the client's
    unknown fields and the order of its keys. Raises BadRequest where the family cannot do what the client asks.

    Facts of an instance (`Instance.facts`) are JSON, and absent where nobody has found them:
    `version` "0.32.0"; of an engine that prefills `ec_port`, where embeddings are pushed to, `bootstrap_port`, its URL
    `bootstrap`, and `engine_ids` by data-parallel rank; `kv_tokens`, the KV it has room for; of one of our encoders
    `vision`, the fields of `vision.Vision`, and `cache_tokens`, the embeddings that it has room for; `encodes`, true of
    one of our language engines that has an encoder of its own.
    """

    name: str
    order: Order  # how prefill and decode are sent, where this instance prefills
    remote_prefills: int | None = None  # for DECODE_FIRST: calls of one decode engine that wait for prefill at once
    vague: bool = False  # its 5xx may tell of KV or embeddings that others made: it may be asked again
    media_instead: bool = False  # who prefills in the place of another gets media, and nothing that was made for that
    owes_prefill: bool = False  # for DECODE_FIRST: hung up on, decode keeps its blocks until its prefill has ended
    given_up: str | None = None  # the `stop_reason` of an answer that decode did not finish: another is to go on
    continues_as_prompt: bool = False  # what goes on is a prompt to its engine: seeds and half a stop string are lost
    verify_images: bool = False  # an image that cannot be decoded ends its engines: it must not get there

    def batches(self, items: Sequence[Item]) -> Sequence[Sequence[Item]]:
        """The items that one encoder gets, as the calls that it gets at once."""
        return [items]

    def encode(self, job: Job, items: Sequence[Item]) -> Body:
        """To an encoder: these items and nothing else of the conversation."""
        raise NotImplementedError

    def awaits(self) -> Mapping[str, Any]:
        """What encoders are told so that they answer before embeddings are there, where this instance is to read them.

        They answer as ever, or with events: `read_encode`'s reply, when it is known where the embeddings will be, and
        [DONE] when they are there. Whoever reads waits for them. Empty: this instance would not.
        """
        return {}

    def expects(self, items: Sequence[Item], room: int) -> Mapping[str, Any]:
        """What encoders are told beside, where this instance is to read the embeddings. `room` as for `rendezvous`."""
        return {}

    def read_encode(self, items: Sequence[Item], reply: Body) -> dict[int, Handle]:
        """A handle for each of `items`, which `encode` was called with. Raises BadReply.

        An item without a handle goes to whoever prefills as the media that it is.
        """
        raise NotImplementedError

    def blame(self, items: Sequence[Item], param: str | None) -> str | None:
        """An encoder's `error.param` in the client's own positions; anything else unchanged."""
        return param

    def rendezvous(self, job: Job, room: int) -> Mapping[str, Any]:
        """For TOGETHER, where this instance prefills: the handoff that both get. `room`: 63 bits, never used before."""
        return {}

    def prefill(self, job: Job, handles: Handles, handoff: Mapping[str, Any] | None) -> Body:
        """To a prefill engine. `handoff`: None in SEQUENTIAL, the rendezvous in TOGETHER, the decode engine's
        descriptor in DECODE_FIRST."""
        raise NotImplementedError

    def headers(self, handoff: Mapping[str, Any] | None) -> Mapping[str, str]:
        """What a prefill request has beside the client's headers."""
        return {}

    def read_prefill(self, reply: Body) -> Mapping[str, Any]:
        """What decode needs in SEQUENTIAL, to be passed on verbatim. Raises BadReply."""
        raise NotImplementedError

    def decode(self, job: Job, handles: Handles, handoff: Mapping[str, Any] | None, metaserver: str) -> Body:
        """To a decode engine. `handoff`: what `read_prefill` gave in SEQUENTIAL, the rendezvous in TOGETHER; in
        DECODE_FIRST it is None and the engine calls `metaserver`."""
        raise NotImplementedError

    def whole(self, job: Job, handles: Handles) -> Body:
        """To a combined engine, which prefills and decodes; it encodes the items that have no handle."""
        raise NotImplementedError

    def abort(self, request_id: str) -> Call | None:
        """Ends a request whose HTTP call was given up; None where hanging up is enough."""
        return None

    def warm_up(self, role: Role, model: str) -> Call | None:
        """A small real request that an instance of `role` serves alone, before it is READY; None if it needs none."""
        return None

    def prefills(self, job: Job) -> int:
        """For DECODE_FIRST: how often the decode engine calls the metaserver for one request."""
        return 1

    def recorded(self, job: Job) -> Body | None:
        """`job`'s body that also asks for the tokens of the answer; None where `continued` is None for all."""
        return None

    def continued(self, job: Job, prompt: Sequence[int], said: Sequence[int]) -> Body | None:
        """`recorded`, of an answer that goes on after the tokens `said`; None where that cannot be exact.

        `prompt`: the tokens of the first attempt's prompt, empty where the engine does not tell them.
        """
        return None
