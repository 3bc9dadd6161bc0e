"""Flags about what clients send."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt


class MediaSettings(BaseModel):
    """Media and bodies: what clients may make the proxy read"""

    max_body_bytes: PositiveInt = Field(256 << 20, description="largest request body accepted")
    measure_urls: Literal["never", "public", "all"] = Field(
        "never",
        description="before planning, read up to 64 KiB of media behind URLs to know their size; public: at addresses "
        "of the open Internet; all: at private ones too, which clients then make the proxy connect to",
    )
    measure_timeout: PositiveFloat = Field(1.0, description="seconds that a request waits for its media's sizes")
