"""Certificates of both sides that rotate while they are in use, the CA that signs them as well."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import trustme

from serve.client.channel import Tls
from tests.faults.requests.r21_credentials import replace_file

_HOST = "127.0.0.1"


class Certificates:
    """Files of certificates that are replaced while they are in use; both sides trust one file."""

    def __init__(self, folder: Path) -> None:
        # The next one is trusted before it signs, the last one is trusted behind it.
        self._authorities = [trustme.CA() for _ in range(3)]
        self._ca, *names = (folder / n for n in ("ca", "cert", "key", "client-cert", "client-key"))
        self._pairs = [(names[0], names[1]), (names[2], names[3])]
        self._trust()
        for path, data in self._issued():
            replace_file(path, data)

    def settings(self) -> dict[str, Any]:
        """Return a server's settings."""
        cert, key = self._pairs[0]
        return {"tls_cert": cert, "tls_key": key, "tls_client_ca": self._ca}

    def tls(self) -> Tls:
        """Return what a client has."""
        cert, key = self._pairs[1]
        return Tls(ca=self._ca, cert=cert, key=key)

    async def rotate(self, rng: random.Random) -> None:
        """Sign with the next CA; the one before the last is trusted no more."""
        self._authorities = [*self._authorities[1:], trustme.CA()]
        self._trust()
        for path, data in self._issued():
            await asyncio.sleep(rng.uniform(0, 0.01))
            replace_file(path, data)

    def _trust(self) -> None:
        replace_file(self._ca, b"".join(ca.cert_pem.bytes() for ca in self._authorities))

    def _issued(self) -> list[tuple[Path, bytes]]:
        """Return what to write, each key before its certificate."""
        found = []
        for cert, key in self._pairs:
            leaf = self._authorities[1].issue_cert(_HOST)
            found.append((key, leaf.private_key_pem.bytes()))
            found.append((cert, b"".join(pem.bytes() for pem in leaf.cert_chain_pems)))
        return found
