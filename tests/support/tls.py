"""An authority of our own, and certificates from it as files."""

from __future__ import annotations

import ssl
from pathlib import Path

import trustme

from proxy.tls import Files


class Authority:
    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._ca = trustme.CA(organization_name=name)
        self._folder = folder
        self.path = folder / f"{name}.pem"
        self._ca.cert_pem.write_to_path(self.path)

    def files(self, name: str, *hosts: str, ca: Path | None = None) -> Files:
        """A certificate for `hosts`, written over the one that `name` had before."""
        issued = self._ca.issue_cert(*(hosts or ("127.0.0.1", "localhost")))
        cert, key = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        return Files(cert, key, ca)

    def trusting(self, shown: Files | None = None) -> ssl.SSLContext:
        """A client that trusts this authority, and shows a certificate if it has one."""
        context = ssl.create_default_context(cafile=self.path)
        if shown is not None and shown.cert is not None:
            context.load_cert_chain(shown.cert, shown.key)
        return context
