"""What a client is told when a handoff fails: transfer errors become engine errors with the stage that is to blame.

encode    the embeddings of an item are lost; encoding it again helps, hence code `embedding_gone`
prefill   the KV is lost; prefilling again helps

What the model raises is told too, without its traceback.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engines.errors import BadRequest, DeadlineExceeded, EngineError, NotFound, Overloaded, TooLarge
from engines.errors import PeerFailed as UpstreamFailed
from engines.language.runner import BadEmbeddings
from engines.language.scheduler import NeverFits
from engines.transfer.base import GoneError, LayoutMismatch, PeerUnreachable, TransferError, TransferTimeout


def lost_embedding(error: TransferError, mm_hash: str) -> EngineError:
    """The embedding of one item did not come."""
    kind = DeadlineExceeded if isinstance(error, TransferTimeout) else UpstreamFailed
    if isinstance(error, LayoutMismatch):
        return kind(f"the embedding of {mm_hash} does not fit: {error}", stage="encode", code="layout_mismatch")
    return kind(f"the embedding of {mm_hash} is lost: {error}", stage="encode", code="embedding_gone")


def lost_kv(error: TransferError, stage: str = "prefill") -> EngineError:
    """The KV did not come from prefill, or (stage decode) could not be brought to the decode engine."""
    if isinstance(error, TransferTimeout):
        return DeadlineExceeded(f"the KV transfer took too long: {error}", stage=stage, code="kv_timeout")
    if isinstance(error, GoneError):
        code = "kv_gone"
    elif isinstance(error, LayoutMismatch):
        code = "layout_mismatch"
    else:
        code = "peer_unreachable" if isinstance(error, PeerUnreachable) else "peer_failed"
    return UpstreamFailed(f"the KV transfer failed: {error}", stage=stage, code=code, retryable=error.retryable)


def broken(error: Exception) -> Exception:
    """What a request is told when running it raised `error`."""
    if isinstance(error, EngineError | TransferError):
        return error
    if isinstance(error, NeverFits):
        return BadRequest(str(error), code="context_length_exceeded")
    if isinstance(error, BadEmbeddings):
        return UpstreamFailed(str(error), stage="encode", code="embedding_invalid")
    told = EngineError(f"the model failed on this request: {error!r}", code="model_failed", retryable=True)
    told.__cause__ = error
    return told


_KINDS: Mapping[int, type[EngineError]] = {
    400: BadRequest,
    404: NotFound,
    413: TooLarge,
    503: Overloaded,
    504: DeadlineExceeded,
}


def refused_prefill(status: int, body: Any) -> EngineError:
    """What the metaserver answered instead of 200: the error of whoever failed there, stage and code kept."""
    error = body.get("error") if isinstance(body, Mapping) else None
    told = error if isinstance(error, Mapping) else {}
    retryable = told.get("retryable")
    return _KINDS.get(status, UpstreamFailed)(
        str(told.get("message") or f"the metaserver answered {status} to a request for prefill"),
        param=told.get("param"),
        code=told.get("code") or "prefill_failed",
        stage=told.get("stage") or "prefill",
        retryable=retryable if isinstance(retryable, bool) else None,
    )
