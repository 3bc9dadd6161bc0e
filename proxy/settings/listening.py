"""Flags about the process."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field, PositiveFloat


class ListeningSettings(BaseModel):
    """The process: where it listens, how it begins and ends"""

    host: str = Field("0.0.0.0", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one, named by the READY line")
    workers: int = Field(
        1, ge=1, le=64, description="processes that serve the port, with one view of load between them"
    )
    grace_timeout: PositiveFloat = Field(30.0, description="seconds that requests may go on after SIGTERM")
    config: Path | None = Field(None, description="YAML file with these flags as keys, - or _ between words")
