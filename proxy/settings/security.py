"""Flags about rights."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from proxy.auth.strikes import Networks
from proxy.settings.endpoint import SECRET


class SecuritySettings(BaseModel):
    """Security: who may do what"""

    api_keys: Path | None = Field(
        None, description="YAML file of the keys that clients need (`triptych key NAME` makes one); none: open to all"
    )
    admin_key: str | None = Field(None, description="what changes of the fleet ask for; none: open to all")
    admin_key_file: Path | None = Field(None, description="file that holds it instead")
    admin_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port that /metrics, /instances, /plan, /requests, /ui and the profilers answer on, and then there "
        "alone; default: they share --port",
    )
    admin_host: str = Field("", description="address of that port; default: --host")
    trusted_proxies: str = Field(
        "", description="networks, as 10.0.0.0/8,fd00::/8, of reverse proxies whose X-Forwarded-For is believed"
    )
    forward_authorization: bool = Field(
        False, description="pass the Authorization of clients on to engines without a key, unless it is a key of ours"
    )
    engine_key: str | None = Field(
        None, pattern=SECRET, description="bearer token for every engine that is not listed with a key of its own"
    )
    tls_cert: Path | None = Field(None, description="PEM certificate with its chain: the proxy listens with TLS alone")
    tls_key: Path | None = Field(None, description="PEM key of it; default: it is in the same file")
    tls_client_ca: Path | None = Field(
        None, description="PEM authorities: clients need a certificate of theirs (not on --admin-port)"
    )
    engine_ca: Path | None = Field(
        None, description="PEM authorities of https engines; default: those that the system trusts"
    )
    engine_cert: Path | None = Field(None, description="PEM certificate that the proxy shows to https engines")
    engine_cert_key: Path | None = Field(None, description="PEM key of it; default: it is in the same file")
    trust_client_identity: bool = Field(
        False,
        description="keep clients' uuids and accept their *_embeds, kv_ and ec_transfer_params: trusted ones only",
    )
    tenant_salt: str = Field("", description="secret; when set, tenants never share an embedding of inline media")
    tenant_header: str = Field(
        "authorization", description="the header that tells tenants apart, where no API key says whose it is"
    )

    @field_validator("trusted_proxies", mode="before")
    @classmethod
    def _joined_networks(cls, value: Any) -> Any:
        """A YAML file may hold a list."""
        return ",".join(map(str, value)) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        needed = (
            ("tls_key", "tls_cert"),
            ("tls_client_ca", "tls_cert"),
            ("engine_cert_key", "engine_cert"),
            ("admin_host", "admin_port"),
        )
        for name, other in needed:
            if getattr(self, name) and getattr(self, other) is None:
                raise ValueError(f"--{name.replace('_', '-')} needs --{other.replace('_', '-')}")
        if self.engine_key is not None and self.admin_key is None and self.admin_key_file is None:
            raise ValueError("--engine-key needs --admin-key: else anybody could register an engine, and be sent it")
        if self.admin_key is not None and self.admin_key_file is not None:
            raise ValueError("--admin-key and --admin-key-file: one of them says it")
        try:
            self.proxies()
        except ValueError as error:
            raise ValueError(f"--trusted-proxies: {error}") from None
        return self

    def proxies(self) -> Networks:
        """The networks of --trusted-proxies. Raises ValueError."""
        return tuple(ip_network(one.strip()) for one in self.trusted_proxies.split(",") if one.strip())

    def admin_secret(self) -> str | None:
        """The admin key, from wherever it is. Raises ValueError naming the file."""
        if self.admin_key_file is None:
            return self.admin_key
        try:
            secret = self.admin_key_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--admin-key-file: {error}") from None
        if not secret:
            raise ValueError(f"--admin-key-file: {self.admin_key_file} is empty")
        return secret
