"""What the control channel says, and the two handles that travel by other routes. Data only.

Every field is bounded, since anybody who reaches the port can send anything: msgspec refuses what does not fit, and
the reader drops it. Tensor bytes never pass through here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from engines.transfer.base import (
    Address,
    GoneError,
    LayoutMismatch,
    PeerFailed,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)

Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}$")]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
Size = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400)]
Host = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.:\[\]%-]{1,255}$")]


class Peer(msgspec.Struct, frozen=True):
    """`Address` as it arrives: checked."""

    host: Host
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    nonce: Hex
    machine: Annotated[str, msgspec.Meta(max_length=64)] = ""
    pid: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
    started: Size = 0

    def address(self) -> Address:
        return Address(self.host, self.port, self.nonce, self.machine, self.pid, self.started)

    @staticmethod
    def of(address: Address) -> Peer:
        return Peer(*msgspec.structs.astuple(address))


class Offer(msgspec.Struct, frozen=True):
    """Leave to write once into these spans; `region` is what the transport needs to reach them."""

    transport: Name
    address: Peer
    ticket: Hex
    arena: Name
    arena_nbytes: Size
    spans: list[tuple[Size, Size]]
    region: dict[str, Any]


class Where(msgspec.Struct, frozen=True):
    """Leave to fetch a publication; `secret` makes it a capability."""

    transport: Name
    address: Peer
    key: Text
    secret: Hex
    nbytes: Size


class Claim(msgspec.Struct, frozen=True, tag="claim"):
    """Sender to receiver: I shall write into this ticket."""

    ticket: Hex


class Fetch(msgspec.Struct, frozen=True, tag="fetch"):
    """Receiver to owner: write this publication into my offer; you hold its ticket already.

    start: the publication's byte that comes first; None: all of it, which the offer must fit. more: I fetch it again.
    """

    key: Text
    secret: Hex
    timeout: Seconds
    offer: Offer
    start: Size | None = None
    more: bool = False


class Close(msgspec.Struct, frozen=True, tag="close"):
    """Sender to receiver: I write no more (done, failed), or I cannot say whether bytes still move (lost)."""

    ticket: Hex
    outcome: Literal["done", "failed", "lost"]
    reason: Text = ""


class Revoke(msgspec.Struct, frozen=True, tag="revoke"):
    """Receiver to sender: stop writing into this ticket."""

    ticket: Hex


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """A transport's own question to its other half."""

    body: dict[str, Any]


class Granted(msgspec.Struct, frozen=True, tag="granted"):
    facts: dict[str, Any]


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    pass


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    code: Text
    reason: Text


class Stopped(msgspec.Struct, frozen=True, tag="stopped"):
    """settled: no byte moves any more."""

    settled: bool


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    body: dict[str, Any]


Question = Claim | Fetch | Close | Revoke | Ask
Response = Granted | Accepted | Refused | Stopped | Answer


class Request(msgspec.Struct, frozen=True):
    """`to` is the nonce of the process life that is meant: a successor on the same port must not answer for it."""

    id: Size
    to: Hex
    sender: Peer
    body: Question


class Reply(msgspec.Struct, frozen=True):
    id: Size
    nonce: Hex
    body: Response


CODES: dict[str, type[TransferError]] = {
    "gone": GoneError,
    "layout": LayoutMismatch,
    "timeout": TransferTimeout,
    "cancelled": TransferCancelled,
    "failed": PeerFailed,
}


def refusal(error: TransferError) -> Refused:
    code = next((code for code, kind in CODES.items() if isinstance(error, kind)), "failed")
    return Refused(code, str(error)[:4096])


def as_error(refused: Refused) -> TransferError:
    return CODES.get(refused.code, PeerFailed)(refused.reason)


T = TypeVar("T", Offer, Where)


def parse(data: object, kind: type[T], transport: str) -> T:
    """A handle from JSON-like data. Raises LayoutMismatch saying what is wrong with it."""
    try:
        handle = msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise LayoutMismatch(f"malformed {kind.__name__.lower()}: {error}") from None
    if handle.transport != transport:
        raise LayoutMismatch(
            f"the peer transfers by {handle.transport!r}, we by {transport!r}: start both engines with one --transfer"
        )
    return handle
