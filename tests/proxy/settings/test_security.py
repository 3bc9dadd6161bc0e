"""Flags about rights."""

from __future__ import annotations

from tests.support.settings import load


def test_nobody_is_trusted_and_tenants_are_told_apart_by_their_credentials() -> None:
    found = load("--decode-servers-urls", "http://d:1")
    assert not found.trust_client_identity
    assert found.tenant_header == "authorization"
