import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.transfer.base import Address, GoneError, LayoutMismatch, PeerFailed, PeerUnreachable
from engines.transfer.messages import CODES, Offer, Peer, Reply, Request, Where, as_error, parse, refusal

PEER = {"host": "127.0.0.1", "port": 1, "nonce": "0" * 32}
OFFER = {
    "transport": "shm",
    "address": PEER,
    "ticket": "1" * 32,
    "arena": "kv",
    "arena_nbytes": 10,
    "spans": [[0, 10]],
    "region": {},
}


def test_an_offer_survives_json():
    offer = parse(msgspec.json.decode(msgspec.json.encode(OFFER)), Offer, "shm")
    assert offer.spans == [(0, 10)]
    assert offer.address.address() == Address("127.0.0.1", 1, "0" * 32)
    assert Peer.of(offer.address.address()) == offer.address


@pytest.mark.parametrize(
    "change",
    [
        {"ticket": "../../etc"},
        {"ticket": 7},
        {"arena": "a/b"},
        {"arena_nbytes": -1},
        {"arena_nbytes": 2**63},
        {"spans": [[0, -1]]},
        {"spans": [[0]]},
        {"spans": "all"},
        {"region": None},
        {"address": PEER | {"host": "h;rm"}},
        {"address": PEER | {"port": 0}},
        {"address": PEER | {"nonce": ""}},
        {"transport": "zmq"},
    ],
)
def test_an_offer_that_does_not_fit_is_refused(change):
    with pytest.raises(LayoutMismatch):
        parse(OFFER | change, Offer, "shm")


@pytest.mark.parametrize("data", [None, [], "where", 3, {}])
def test_what_is_no_handle_is_refused(data):
    with pytest.raises(LayoutMismatch, match="malformed where"):
        parse(data, Where, "shm")


@given(st.binary(max_size=200))
def test_garbage_is_a_decode_error_and_nothing_else(data):
    for kind in (Request, Reply):
        with pytest.raises((msgspec.DecodeError, msgspec.ValidationError)):
            msgspec.msgpack.decode(b"\x81" + data, type=kind)


@pytest.mark.parametrize("kind", CODES.values())
def test_a_refusal_keeps_its_kind_and_reason(kind):
    assert type(as_error(refusal(kind("why")))) is kind
    assert str(as_error(refusal(kind("why")))) == "why"


def test_other_errors_arrive_as_a_failed_peer():
    assert isinstance(as_error(refusal(PeerUnreachable("x"))), PeerFailed)
    assert isinstance(refusal(GoneError("y" * 9999)).reason, str)
    assert len(refusal(GoneError("y" * 9999)).reason) == 4096
