"""TLS of a listener: a certificate that can be replaced while the server runs, and mTLS.

New connections get the newest pair of certificate and key that belong together; connections that
are open keep theirs.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from bundle.errors import UserError
from serve.rpc.credentials.reloading import Reloaded


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the server's chain, its key, and for mTLS the CA that signs its clients."""

    cert: Path
    key: Path
    client_ca: Path | None

    @property
    def paths(self) -> list[Path]:
        return [self.cert, self.key] + ([self.client_ca] if self.client_ca else [])

    def read(self) -> list[bytes]:
        """Return the files' bytes, in the order of `paths`. UserError: one cannot be read."""
        contents = []
        for flag, path in zip(("cert", "key", "client-ca"), self.paths, strict=False):
            try:
                contents.append(path.read_bytes())
            except OSError as error:
                raise UserError(f"--tls-{flag} {path}: {error.strerror}") from error
        return contents


def server_credentials(cert: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """Return credentials that follow their files; with `client_ca` clients need a certificate.

    Of one listener: grpc asks the same credentials for their first certificate once only.

    Raises:
        UserError: a file is missing or unreadable, or certificate and key do not belong together;
            the text names the flag. Later such files are logged, and the last good ones stay.
    """
    files = TlsFiles(cert, key, client_ca)
    reloaded = Reloaded(files.paths, lambda: _load(files))
    return grpc.dynamic_ssl_server_credentials(
        reloaded.current(), _fetcher(reloaded), require_client_authentication=client_ca is not None
    )


def _fetcher(
    reloaded: Reloaded[grpc.ServerCertificateConfiguration],
) -> Callable[[], grpc.ServerCertificateConfiguration]:
    """Return what grpc calls, on threads of its own, before every handshake."""
    used = reloaded.current()

    def fetch() -> grpc.ServerCertificateConfiguration:
        nonlocal used
        newest = reloaded.current()
        if newest is used:
            return None  # type: ignore[return-value]  # "unchanged"; the stubs do not know of it
        used = newest
        return newest

    return fetch


def _load(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    contents = files.read()
    _check(files)
    # OpenSSL checked what it read itself: that must be what is handed to grpc.
    if files.read() != contents:
        raise UserError(f"--tls-cert {files.cert}: the files changed while they were read")
    cert, key, *client_ca = contents
    return grpc.ssl_server_certificate_configuration(
        [(key, cert)], client_ca[0] if client_ca else None
    )


def _check(files: TlsFiles) -> None:
    """Raise UserError unless OpenSSL takes the files; grpc would say no more than "failed"."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password an encrypted key would be asked for on the terminal.
        context.load_cert_chain(files.cert, files.key, password="")
    except OSError as error:  # of which ssl.SSLError is one; a file may be gone by now
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"--tls-cert {files.cert} and --tls-key {files.key}: {reason}; give a "
            "PEM chain, the server's own certificate first, and the unencrypted PEM key of that"
        ) from error
    if files.client_ca is None:
        return
    try:
        context.load_verify_locations(files.client_ca)
    except OSError as error:
        raise UserError(f"--tls-client-ca {files.client_ca}: no PEM certificate in it") from error
