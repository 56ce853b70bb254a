"""Certificates of a CA that is made up here, as files."""

from __future__ import annotations

from pathlib import Path

import trustme


class Pki:
    """A CA and a server's files: `cert`, `key`, and `client_ca`, which holds the CA."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self.host = host
        self.cert, self.key, self.client_ca = folder / "cert", folder / "key", folder / "ca"
        self.ca = trustme.CA()
        self.ca.cert_pem.write_to_path(self.client_ca)
        self.install(self.ca)

    def install(self, ca: trustme.CA) -> None:
        """Give the server a new certificate and key."""
        issued = ca.issue_cert(self.host)
        self.key.write_bytes(issued.private_key_pem.bytes())
        self.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
