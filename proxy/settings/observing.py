"""Flags about looking on."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ObservingSettings(BaseModel):
    """Observing: what is told to people and their tools"""

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what goes to stderr")
