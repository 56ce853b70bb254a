"""TLS of an asyncio gRPC server over real channels: who gets in, and how certificates rotate."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from bundle.errors import UserError
from serve.rpc.credentials.tls import server_credentials
from tests.support.rpc.authorities import Pki

HOST = "127.0.0.1"
PAST = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


def credentials_of(pki: Pki, *, mtls: bool = False) -> grpc.ServerCredentials:
    return server_credentials(pki.cert, pki.key, pki.client_ca if mtls else None)


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


async def peer(data: bytes, context: Any) -> bytes:
    return context.peer().encode()


@pytest.fixture
def listening(loop: asyncio.AbstractEventLoop) -> Any:
    """`with listening(credentials) as port`: a server whose every call answers the peer."""

    @contextmanager
    def listen(credentials: grpc.ServerCredentials) -> Iterator[int]:
        async def start() -> tuple[grpc.aio.Server, int]:
            server = grpc.aio.server()
            handler = grpc.unary_unary_rpc_method_handler(peer)
            server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler("test.Echo", {"Peer": handler}),)
            )
            port = server.add_secure_port(f"{HOST}:0", credentials)
            await server.start()
            return server, port

        server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
        try:
            yield port
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(10)

    return listen


@contextmanager
def connected(port: int, ca: trustme.CA, client: trustme.LeafCert | None = None) -> Iterator[Any]:
    """Return what calls the server over one connection, which no other channel shares."""
    key = client.private_key_pem.bytes() if client else None
    chain = client.cert_chain_pems[0].bytes() if client else None
    credentials = grpc.ssl_channel_credentials(ca.cert_pem.bytes(), key, chain)
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(f"{HOST}:{port}", credentials, options) as channel:
        method = channel.unary_unary("/test.Echo/Peer")
        yield lambda: method(b"", timeout=10)


def is_refused(port: int, ca: trustme.CA, client: trustme.LeafCert | None = None) -> bool:
    with connected(port, ca, client) as call:
        try:
            call()
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            return True
    return False


def presented(port: int) -> bytes:
    """Return the server's certificate in DER."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((HOST, port), 10) as raw, context.wrap_socket(raw) as tls:
        certificate = tls.getpeercert(binary_form=True)
    assert certificate is not None
    return certificate


def test_client_that_trusts_the_ca_is_served_and_another_is_not(pki: Pki, listening: Any) -> None:
    with listening(credentials_of(pki)) as port:
        assert not is_refused(port, pki.ca)
        assert is_refused(port, trustme.CA())


def test_plaintext_client_is_refused(pki: Pki, listening: Any) -> None:
    with listening(credentials_of(pki)) as port:
        with grpc.insecure_channel(f"{HOST}:{port}") as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary("/test.Echo/Peer")(b"", timeout=10)
        assert not is_refused(port, pki.ca)


def test_mtls_admits_clients_of_its_ca_alone(pki: Pki, listening: Any) -> None:
    expired = pki.ca.issue_cert("old", not_after=PAST)
    with listening(credentials_of(pki, mtls=True)) as port:
        assert not is_refused(port, pki.ca, pki.ca.issue_cert("ada"))
        assert is_refused(port, pki.ca)
        assert is_refused(port, pki.ca, trustme.CA().issue_cert("eve"))
        assert is_refused(port, pki.ca, expired)
        assert not is_refused(port, pki.ca, pki.ca.issue_cert("ada"))


def test_rotated_certificate_is_for_new_connections_and_old_ones_live_on(
    pki: Pki, listening: Any
) -> None:
    newer = trustme.CA()  # which the old client does not trust: it could not connect again
    with listening(credentials_of(pki)) as port, connected(port, pki.ca) as old_call:
        address, certificate = old_call(), presented(port)
        for ca in (newer, trustme.CA(), newer):
            pki.install(ca)
            with connected(port, ca) as new_call:
                assert new_call() != address
                assert [old_call() for _ in range(20)] == [address] * 20
        assert is_refused(port, pki.ca)
        assert presented(port) != certificate


def test_rotated_client_ca_is_for_new_connections(pki: Pki, listening: Any) -> None:
    newer = trustme.CA()
    with listening(credentials_of(pki, mtls=True)) as port:
        newer.cert_pem.write_to_path(pki.client_ca)
        assert is_refused(port, pki.ca, pki.ca.issue_cert("ada"))
        assert not is_refused(port, pki.ca, newer.issue_cert("ada"))


def test_half_rotated_pair_keeps_the_old_one_until_it_is_whole(
    pki: Pki, listening: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with listening(credentials_of(pki)) as port:
        certificate, key = presented(port), pki.key.read_bytes()
        pki.install(pki.ca)
        whole = pki.key.read_bytes()
        for half in (key, whole[:60], b""):
            pki.key.write_bytes(half)
            assert [presented(port) for _ in range(3)] == [certificate] * 3
        texts = [
            r.getMessage() for r in caplog.records if r.name == "serve.rpc.credentials.reloading"
        ]
        assert len(texts) == 3, "one line per change, not per connection"
        assert "KEY_VALUES_MISMATCH" in texts[0]
        pki.key.write_bytes(whole)
        assert presented(port) != certificate
        assert not is_refused(port, pki.ca)


def test_two_listeners_have_credentials_of_their_own(pki: Pki, listening: Any) -> None:
    with listening(credentials_of(pki)) as first, listening(credentials_of(pki)) as second:
        pki.install(newer := trustme.CA())
        assert not is_refused(first, newer)
        assert not is_refused(second, newer)


@pytest.mark.parametrize("name", ["cert", "key", "client_ca"])
def test_missing_file_names_its_flag(pki: Pki, name: str) -> None:
    path: Path = getattr(pki, name)
    path.unlink()
    flag = f"--tls-{name.replace('_', '-')}"
    with pytest.raises(UserError, match=f"{flag} {path}: No such file"):
        credentials_of(pki, mtls=True)


def encrypted(pem: bytes) -> bytes:
    key = serialization.load_pem_private_key(pem, None)
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )


@pytest.mark.parametrize("damage", ["mismatch", "no cert", "no key", "encrypted key"])
def test_pair_that_cannot_be_used_names_both_flags(pki: Pki, damage: str) -> None:
    if damage == "mismatch":
        pki.ca.issue_cert(HOST).private_key_pem.write_to_path(pki.key)
    elif damage == "encrypted key":
        pki.key.write_bytes(encrypted(pki.key.read_bytes()))
    else:
        (pki.cert if damage == "no cert" else pki.key).write_bytes(b"no PEM")
    with pytest.raises(UserError, match=f"--tls-cert {pki.cert} and --tls-key {pki.key}: "):
        credentials_of(pki)


def test_client_ca_without_certificate_names_its_flag(pki: Pki) -> None:
    pki.client_ca.write_bytes(b"no PEM")
    with pytest.raises(UserError, match=f"--tls-client-ca {pki.client_ca}: no PEM certificate"):
        credentials_of(pki, mtls=True)


def test_files_that_change_while_they_are_read_are_refused(
    pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = ssl.SSLContext.load_cert_chain

    def load_and_replace(context: ssl.SSLContext, *args: Any, **options: Any) -> None:
        load(context, *args, **options)
        pki.install(pki.ca)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", load_and_replace)
    with pytest.raises(UserError, match=f"--tls-cert {pki.cert}: the files changed"):
        credentials_of(pki)
