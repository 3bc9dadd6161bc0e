from __future__ import annotations

import pytest

from engines.errors import EngineError
from engines.language.failures import broken, lost_embedding, lost_kv, refused_prefill
from engines.language.runner import BadEmbeddings
from engines.language.scheduler import NeverFits
from engines.language.sequence import SamplingParams, Sequence
from engines.transfer.base import (
    GoneError,
    LayoutMismatch,
    PeerFailed,
    PeerUnreachable,
    TransferError,
    TransferTimeout,
)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (GoneError("gone"), 502, "embedding_gone"),
        (PeerFailed("dead"), 502, "embedding_gone"),
        (PeerUnreachable("away"), 502, "embedding_gone"),
        (TransferTimeout("late"), 504, "embedding_gone"),
        (LayoutMismatch("other"), 502, "layout_mismatch"),
    ],
)
def test_a_lost_embedding_is_the_encoders(error: TransferError, status: int, code: str) -> None:
    told = lost_embedding(error, "f00")
    assert (told.status, told.code, told.stage, told.retryable) == (status, code, "encode", True)
    assert "f00" in told.message


@pytest.mark.parametrize(
    ("error", "status", "code", "retryable"),
    [
        (GoneError("gone"), 502, "kv_gone", True),
        (PeerFailed("dead"), 502, "peer_failed", True),
        (PeerUnreachable("away"), 502, "peer_unreachable", True),
        (TransferTimeout("late"), 504, "kv_timeout", True),
        (LayoutMismatch("other"), 502, "layout_mismatch", False),
    ],
)
def test_lost_kv_is_prefills(error: TransferError, status: int, code: str, retryable: bool) -> None:
    told = lost_kv(error)
    assert (told.status, told.code, told.stage, told.retryable) == (status, code, "prefill", retryable)
    assert lost_kv(error, "decode").stage == "decode"


@pytest.mark.parametrize("status", [400, 404, 413, 500, 502, 503, 504])
def test_a_refusal_keeps_what_was_told(status: int) -> None:
    said = {"message": "no", "stage": "encode", "code": "c", "param": "messages[0]", "retryable": False}
    told = refused_prefill(status, {"error": said})
    assert told.status == (status if status != 500 else 502)
    assert (told.message, told.stage, told.code, told.param) == ("no", "encode", "c", "messages[0]")
    assert told.retryable is False


@pytest.mark.parametrize("body", [None, [], {"error": "text"}, {"error": {}}])
def test_a_refusal_without_words_gets_some(body: object) -> None:
    told = refused_prefill(500, body)
    assert (told.stage, told.code) == ("prefill", "prefill_failed")
    assert "answered 500" in told.message


def test_what_the_model_raises_is_told_apart() -> None:
    known = PeerFailed("dead")
    assert broken(known) is known
    assert isinstance(fits := broken(NeverFits("too long")), EngineError)
    assert fits.status == 400
    seq = Sequence("s", [1], 1, SamplingParams(max_tokens=1))
    assert isinstance(bad := broken(BadEmbeddings(seq, "not finite")), EngineError)
    assert (bad.stage, bad.code) == ("encode", "embedding_invalid")
    cause = ValueError("boom")
    assert isinstance(told := broken(cause), EngineError)
    assert (told.status, told.code, told.retryable, told.__cause__) == (500, "model_failed", True, cause)
