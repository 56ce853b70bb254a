"""What commands that call a server share: flags for credentials, the client, JSON of an answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from bundle.errors import UserError

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from serve.client import Client, ControlClient, Tls

    AnyClient = TypeVar("AnyClient", Client, ControlClient)

# All attempts that a client may make take 16 s where nobody listens.
_MAX_ATTEMPTS = 2

TokenFile = Annotated[
    Path | None, typer.Option("--token-file", help="The first line is the token.")
]
TlsCa = Annotated[
    Path | None, typer.Option("--tls-ca", help="PEM that signs the server; encrypts the call.")
]
TlsCert = Annotated[
    Path | None,
    typer.Option("--tls-cert", help="PEM of this client, where the server asks for it."),
]
TlsKey = Annotated[Path | None, typer.Option("--tls-key", help="PEM key of --tls-cert.")]


def read_token(path: Path | None, flag: str = "--token-file") -> str | None:
    """Return the first line of a file, None without one. UserError: there is no such line."""
    if path is None:
        return None
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{flag} {path} is not UTF-8 text") from None
    if not lines or not lines[0].strip():
        raise UserError(f"{flag} {path}: the first line is empty; it must be the token")
    return lines[0].strip()


def tls_of(ca: Path | None, cert: Path | None, key: Path | None) -> Tls | None:
    """Return how to encrypt; None if nothing asks for it. UserError: half of a certificate."""
    from serve.client import Tls

    if ca is None and cert is None and key is None:
        return None
    try:
        return Tls(ca=ca, cert=cert, key=key)
    except ValueError as error:
        raise UserError(f"--tls-cert and --tls-key: {error}") from None


def open_client(
    kind: type[AnyClient], target: str, timeout_s: float, token: str | None, tls: Tls | None
) -> AnyClient:
    """Return a client for somebody who looks on: it says soon that nobody answers.

    UserError for credentials that cannot be read or would be unsafe.
    """
    try:
        return kind(target, timeout_s=timeout_s, token=token, tls=tls, max_attempts=_MAX_ATTEMPTS)
    except (OSError, ValueError) as error:
        raise UserError(f"{target}: {error}") from None


def to_json(message: Message) -> str:
    """Return a message as JSON with the names of the .proto, zeros included."""
    from google.protobuf.json_format import MessageToJson

    return MessageToJson(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
