"""Flags about time."""

from __future__ import annotations

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt


class PatienceSettings(BaseModel):
    """Patience: how long engines, probes and requests may take"""

    connect_timeout: PositiveFloat = Field(5.0, description="seconds to connect to an engine")
    encode_timeout: PositiveFloat = Field(60.0, description="seconds for an encoder's whole answer")
    prefill_timeout: PositiveFloat = Field(300.0, description="seconds for a prefill engine's whole answer")
    first_token_timeout: PositiveFloat = Field(
        120.0, description="seconds from the decode call to a stream's first content, not counting prefill"
    )
    stream_idle_timeout: PositiveFloat = Field(60.0, description="seconds between two pieces of a stream")
    answer_timeout: PositiveFloat = Field(
        600.0, description="seconds from the decode call to the end of an unstreamed answer, not counting prefill"
    )
    request_timeout: PositiveFloat | None = Field(
        None, description="seconds for a whole request; the header x-request-timeout comes first; default: no limit"
    )
    probe_interval: PositiveFloat = Field(2.0, description="seconds between two probes of an engine")
    probe_timeout: PositiveFloat = Field(2.0, description="seconds for a probe's answer")
    probe_failures: PositiveInt = Field(3, description="failed probes in a row that make an engine DOWN")
    switch_timeout: PositiveFloat = Field(
        120.0, description="seconds for an engine to turn to another role: what runs there ends first, else it stays"
    )
    warm_up_timeout: PositiveFloat = Field(
        120.0, description="seconds for the one real request that an engine of another family answers before it serves"
    )
