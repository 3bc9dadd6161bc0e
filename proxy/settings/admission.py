"""Flags about load."""

from __future__ import annotations

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt


class AdmissionSettings(BaseModel):
    """Admission: how much is served at once, who waits, who is refused"""

    max_concurrent: PositiveInt = Field(4096, description="requests served at once; more wait")
    max_bytes_in_flight: PositiveInt = Field(4 << 30, description="body bytes of the requests served at once")
    max_queue: int = Field(1024, ge=0, description="requests that may wait for a place; more are refused with 429")
    queue_timeout: PositiveFloat = Field(30.0, description="seconds that a request waits for a place at the most")
    ttft_target: PositiveFloat | None = Field(
        None,
        description="seconds to the first token that are foreseen for every request admitted: others wait while that "
        "may help, and are refused with 429; the header x-ttft-target comes first; default: no target",
    )
    tpot_target: PositiveFloat | None = Field(
        None, description="seconds per output token that are foreseen for every request admitted; default: no target"
    )
    max_embedding_bytes: PositiveInt | None = Field(
        None, description="predicted bytes of embeddings on their way to one prefill engine; default: no bound"
    )
