"""What commands that call a server share: flags for credentials, the client, JSON of an answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from bundle.errors import UsageError, UserError
from serve.addresses import DATA_PORT, parse_target

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc
    from google.protobuf.message import Message

    from serve.client.channel import Tls
    from serve.client.client import Client, ControlClient

    AnyClient = TypeVar("AnyClient", Client, ControlClient)

# All attempts that a client may make take 16 s where nobody listens.
_MAX_ATTEMPTS = 2
# Behind it, people are told that they wait.
_MOMENT_S = 0.3
# What gRPC says where something else answers.
_NO_GRPC = ("http1.x", "Failed parsing HTTP/2")
# Of the call that is to say why there is no connection.
_REASON_TIMEOUT_S = 1.0

ConnectTimeout = Annotated[
    float, typer.Option(min=0.1, help="Time to wait for a connection, in seconds.")
]
CONNECT_TIMEOUT_S = 5.0

TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", help="File whose first line is the token (default: no token)."),
]
TlsCa = Annotated[
    Path | None,
    typer.Option("--tls-ca", help="PEM of the CA that signs the server (default: no TLS)."),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        "--tls-cert", help="PEM chain of this client, if the server asks for one (default: none)."
    ),
]
TlsKey = Annotated[
    Path | None, typer.Option("--tls-key", help="PEM key of --tls-cert (default: none).")
]


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
    from serve.client.channel import Tls

    if ca is None and cert is None and key is None:
        return None
    try:
        return Tls(ca=ca, cert=cert, key=key)
    except ValueError as error:
        raise UserError(f"--tls-cert and --tls-key: {error}") from None


def read_target(text: str, default_port: int = DATA_PORT) -> str:
    """Return --target as gRPC takes it; UsageError with what to write."""
    try:
        return parse_target(text, default_port)
    except ValueError as error:
        raise UsageError(f"--target {text!r} {error}") from None


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


def wait_connected(
    client: Client | ControlClient,
    target: str,
    timeout_s: float,
    call: Callable[[float], object],
    tell: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> None:
    """Wait until the server is reached; says so when that takes longer than a moment.

    `call` makes some call in so many seconds, whose error says why there is no connection.

    Raises:
        UserError: there is no connection in that time; says why, as far as it is known.
    """
    if client.connect(min(_MOMENT_S, timeout_s)):
        return
    tell(f"waiting for {target}, up to {timeout_s:g} s ...")
    if not client.connect(max(timeout_s - _MOMENT_S, 0.0)):
        raise UserError(
            f"{target}: no connection in {timeout_s:g} s{_why_unreachable(call)}. Is `tandem serve`"
            " running there, with this port? With TLS, give --tls-ca"
        )


def _why_unreachable(call: Callable[[float], object]) -> str:
    import grpc

    try:
        call(_REASON_TIMEOUT_S)
    except grpc.RpcError as error:
        details = " ".join((error.details() or "").split())
        if any(sign in details for sign in _NO_GRPC):
            return ": what is there speaks no gRPC in clear: it has TLS, or is HTTP, as of metrics"
        if error.code() is grpc.StatusCode.UNAVAILABLE and details:
            return f": {details.rpartition('last error: ')[2]}"
    return ""


def explain_to_user(error: grpc.RpcError, target: str, missing: str) -> UserError:
    """Return what to show of a call that failed; `missing` says what else is at that port."""
    import grpc

    from serve.client.failures import explain

    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return UserError(f"{target}: {missing}")
    return UserError(f"{target}: {explain(error)}")


def to_json(message: Message) -> str:
    """Return a message as JSON with the names of the .proto, zeros included."""
    from google.protobuf.json_format import MessageToJson

    return MessageToJson(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
