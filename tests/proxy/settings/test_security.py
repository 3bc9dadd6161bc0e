"""Flags about rights."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import pytest

from proxy.settings import ProxySettings
from tests.support.settings import load


def test_nobody_is_trusted_and_tenants_are_told_apart_by_their_credentials() -> None:
    found = load("--decode-servers-urls", "http://d:1")
    assert not found.trust_client_identity and not found.forward_authorization
    assert found.tenant_header == "authorization"
    assert found.proxies() == () and found.admin_secret() is None


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--tls-key", "k"), "--tls-key needs --tls-cert"),
        (("--tls-client-ca", "c"), "--tls-client-ca needs --tls-cert"),
        (("--engine-cert-key", "k"), "--engine-cert-key needs --engine-cert"),
        (("--admin-host", "::1"), "--admin-host needs --admin-port"),
        (("--admin-key", "a", "--admin-key-file", "b"), "--admin-key and --admin-key-file: one of them"),
        (("--engine-key", "e"), "--engine-key needs --admin-key"),
        (("--trusted-proxies", "10.0.0.1/8"), "--trusted-proxies: 10.0.0.1/8 has host bits set"),
    ],
)
def test_what_does_not_fit_together_is_told(
    flags: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        load("--decode-servers-urls", "http://d:1", *flags)
    assert says in capsys.readouterr().err


def test_networks_of_proxies_may_be_a_list_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("decode-servers-urls: http://d:1\ntrusted-proxies: [10.0.0.0/8, 'fd00::/8']\n")
    assert load("--config", str(file)).proxies() == (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


def test_the_admin_key_may_be_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    found = ProxySettings(decode_servers_urls="http://d:1", admin_key_file=file)
    with pytest.raises(ValueError, match=f"--admin-key-file: .*{file}"):
        found.admin_secret()
    file.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        found.admin_secret()
    file.write_text("s3cret\n")
    assert found.admin_secret() == "s3cret"
