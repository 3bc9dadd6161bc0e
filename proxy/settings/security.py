"""Flags about rights."""

from __future__ import annotations

from pydantic import BaseModel, Field


class SecuritySettings(BaseModel):
    """Security: who may do what"""

    admin_key: str | None = Field(None, description="what POST and DELETE /instances ask for; none: open to all")
    trust_client_identity: bool = Field(
        False,
        description="keep clients' uuids and accept their *_embeds, kv_ and ec_transfer_params: trusted ones only",
    )
    tenant_salt: str = Field("", description="secret; when set, tenants never share an embedding of inline media")
    tenant_header: str = Field("authorization", description="the header that tells tenants apart")
