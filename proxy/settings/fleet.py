"""Flags about engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, PositiveFloat, field_validator, model_validator

from proxy.core import BOTH, Order, Role
from proxy.dialects import DIALECTS
from proxy.dialects.base import Media
from proxy.dialects.sglang import Sglang
from proxy.settings.endpoint import FINDERS, Endpoint, nothing, urls, written

_ORDERS = {"push": Order.DECODE_FIRST, "pull": Order.SEQUENTIAL, "together": Order.TOGETHER}


class FleetSettings(BaseModel):
    """Engines: which there are and how they are spoken to"""

    encode_servers_urls: str = Field("", description="encoders, as URL,URL; empty for a deployment without")
    prefill_servers_urls: str = Field(
        "", description="prefill engines; 'disable', 'none' or empty: the decode list holds combined engines"
    )
    decode_servers_urls: str = Field("", description="decode engines, or combined ones without a prefill list")
    register_key: str | None = Field(
        None,
        description="what engines show that register themselves (their --register-key); with it the lists may be "
        "empty; default: the admin key",
    )
    discovery_interval: PositiveFloat = Field(
        5.0, description=f"seconds between two look-ups of names: {FINDERS['dns']}, {FINDERS['srv']}"
    )
    dns_server: str = Field("", description="address or address:port to ask for them; default: as resolv.conf says")
    kubernetes_api: str = Field(
        "https://kubernetes.default.svc", description=f"API server that is watched for endpoints: {FINDERS['k8s']}"
    )
    kubernetes_credentials: Path = Field(
        Path("/var/run/secrets/kubernetes.io/serviceaccount"), description="folder with its token and ca.crt"
    )
    dialect: str = Field("auto", description=f"of URLs without one: {', '.join(DIALECTS)}; auto asks each engine")
    kv_handoff: Literal["auto", "push", "pull", "together"] = Field(
        "auto",
        description="push: decode reserves and prefill writes layer by layer; pull: decode reads from prefill; "
        "together: both are called at once; auto: as the engine family does by default",
    )
    media_to_prefill: Media = Field(
        Media.AUTO,
        description="of vLLM engines, media that encoders have encoded; auto: where the engine would not survive that "
        "an embedding is gone; never: embeddings are never deleted, or the engine takes no media",
    )
    virtual_encoder_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port for SGLang's language servers, which find all encoders behind it as one; never for clients",
    )
    virtual_encoder_url: str | None = Field(
        None, description="where language servers reach that port; default: the address that leads to them"
    )
    encoder_register_urls: str = Field(
        "", description="language servers to register it at, as URL,URL with their --encoder-bootstrap-port"
    )
    metaserver_url: str | None = Field(
        None, description="where decode engines reach this proxy (push); default: the address that leads to them"
    )
    metaserver_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port for that alone, without TLS, and open until the last request has ended; default: they share "
        "--port, which after SIGTERM then refuses new requests instead of connections",
    )

    @field_validator("encode_servers_urls", "prefill_servers_urls", "decode_servers_urls", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        """A YAML file may hold a list, with mappings in it."""
        return ",".join(map(written, value)) if isinstance(value, list) else ("" if value is None else value)

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        endpoints = self.fleet()
        if self.register_key is None and not any(Role.DECODE in role for role, _ in endpoints):
            raise ValueError("--decode-servers-urls: at least one engine is needed, or --register-key for some to come")
        listed = [endpoint.name for _, endpoint in endpoints]
        twice = next((url for url in listed if listed.count(url) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is listed twice: an engine has one role")
        if self.lists() and self.virtual_encoder_port is None:
            raise ValueError("--encoder-register-urls: what is to be registered listens on --virtual-encoder-port")
        return self

    def fleet(self) -> list[tuple[Role, Endpoint]]:
        """Every engine of the three lists with its role, and the names behind which there are some. Raises
        ValueError."""
        split = not nothing(self.prefill_servers_urls)
        lists = (
            (Role.ENCODE, self.encode_servers_urls),
            (Role.PREFILL, self.prefill_servers_urls),
            (Role.DECODE if split else BOTH, self.decode_servers_urls),
        )
        return [(role, Endpoint.parse(url, self.dialect)) for role, text in lists for url in urls(text)]

    def lists(self) -> list[str]:
        """The bootstrap servers that get to know the virtual encoder. Raises ValueError."""
        return [Endpoint.parse(url, Sglang.name).url for url in urls(self.encoder_register_urls)]

    @property
    def order(self) -> Order | None:
        """None: each engine family's own."""
        return _ORDERS.get(self.kv_handoff)
