"""Flags about looking on."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from pydantic import BaseModel, Field, field_validator


class ObservingSettings(BaseModel):
    """Observing: what is told to people and their tools"""

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what goes to stderr")
    access_log: Literal["console", "json", "off"] | None = Field(
        None,
        description="a line on stderr for each request that has ended, for people or for programs; "
        "without this, for people where --log-level is debug or info",
    )
    metrics: Literal["on", "off"] = Field(
        "on",
        description="whether requests are counted and timed for GET /metrics; off saves a few microseconds of each",
    )
    receipts: int = Field(
        256, ge=0, description="requests per worker whose receipts GET /requests can show: some 2 KB of memory each"
    )
    otlp_endpoint: str | None = Field(
        None, description="an OpenTelemetry collector that takes traces by HTTP, such as http://localhost:4318"
    )
    trace_sample: float = Field(
        0.1, ge=0, le=1, description="of the traces that begin here, the share that is sent; callers decide for theirs"
    )

    def access_form(self) -> Literal["console", "json", "off"]:
        """What `--access-log` says, or what follows from the rest."""
        return self.access_log or ("console" if self.log_level in ("debug", "info") else "off")

    @field_validator("otlp_endpoint")
    @classmethod
    def _reachable(cls, url: str | None) -> str | None:
        if url is None:
            return None
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is no http:// or https:// URL")
        if find_spec("opentelemetry") is None:
            raise ValueError("sending traces needs the extra: pip install 'triptych[tracing]'")
        return url
