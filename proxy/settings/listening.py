"""Flags about the process."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat


class ListeningSettings(BaseModel):
    """The process: where it listens, how it begins and ends"""

    host: str = Field("0.0.0.0", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one, named by the READY line")
    workers: int = Field(
        1, ge=1, le=64, description="processes that serve the port, with one view of load between them"
    )
    start_delay: NonNegativeFloat = Field(
        10.0,
        description="seconds that a start waits for its engines before it listens, at the most: until every kind of "
        "request can be served, or each engine has been asked",
    )
    drain_delay: NonNegativeFloat = Field(
        0.0,
        description="seconds after SIGTERM in which new requests are still served while /ready says 503: as long as "
        "whoever sends them takes to notice",
    )
    grace_timeout: PositiveFloat = Field(
        30.0, description="seconds that requests may then go on; those that are left end with an error that says so"
    )
    config: Path | None = Field(
        None,
        description="YAML file with these flags as keys, - or _ between words; read again on SIGHUP or when it changes",
    )
