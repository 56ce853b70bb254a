"""The gate over real channels: who may call what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from serve.rpc.credentials.tls import server_credentials
from serve.rpc.credentials.tokens import TokenFile
from serve.rpc.gate import LogLimit
from tests.support.polling import wait_until
from tests.support.rpc.authorities import Pki
from tests.support.rpc.calls import failure
from tests.support.rpc.gated import CODE, HOST, KINDS


def test_every_kind_of_call_passes_and_knows_its_client(gated: Any, tokens: TokenFile) -> None:
    with gated(tokens=tokens) as it:
        assert it.result("UnaryUnary", token="ada") == b"x of ada"
        assert it.result("UnaryStream", token="bob") == b"x of bob x of bob x of bob"
        assert it.result("Written", token="ada") == b"x of ada"
        assert it.result("StreamUnary", token="bob") == b"x of bob"
        assert it.result("StreamStream", token="ada") == b"x of ada"
        assert it.rejected == []


def test_messages_go_through_the_handlers_own_serializers(gated: Any) -> None:
    with gated() as it:
        assert it.result("Decoded", b"Xy") == b"xy of "


def test_empty_message_is_a_message(gated: Any) -> None:
    with gated() as it:
        assert it.result("UnaryUnary", b"") == b" of "


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_token_is_refused_before_the_message_is_read(
    gated: Any, unsent: Any, tokens: TokenFile, kind: str
) -> None:
    with gated(tokens=tokens) as it:
        method = it.channel.stream_stream(f"/test.Echo/{kind}")
        call = method(unsent(), metadata=(("authorization", "Bearer eve"),), timeout=10)
        assert failure(lambda: next(call)).code() is CODE.UNAUTHENTICATED


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", "Bearer eve"),),
        (("authorization", "Bearer "),),
        (("authorization", "ada"),),
        (("authorization", "Basic ada"),),
        (("authorization", "Bearer ada"), ("authorization", "Bearer ada")),
        (("authorization-bin", b"Bearer ada"),),
        (("x-token", "ada"),),
    ],
)
def test_all_wrong_credentials_get_the_same_answer(
    gated: Any, tokens: TokenFile, metadata: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with gated(tokens=tokens) as it:
        error = it.refusal("UnaryUnary", metadata=metadata)
        assert error.code() is CODE.UNAUTHENTICATED
        assert error.details() == "a valid token is needed: authorization: Bearer TOKEN"
        assert it.rejected == ["unauthenticated"]
        assert it.result("UnaryUnary", token="ada") == b"x of ada"
    assert "eve" not in caplog.text and "ada" not in caplog.text


def test_scheme_is_read_as_http_does(gated: Any, tokens: TokenFile) -> None:
    with gated(tokens=tokens) as it:
        assert it.result("UnaryUnary", metadata=(("authorization", "bearer  ada"),)) == b"x of ada"


def test_token_without_the_scope_is_told_so(gated: Any, tokens: TokenFile) -> None:
    with gated(tokens=tokens) as it:
        error = it.refusal("Admin", token="bob")
        assert (error.code(), error.details()) == (
            CODE.UNAUTHENTICATED,
            "the token does not allow this call",
        )
        assert it.rejected == ["unauthenticated"]
        assert it.result("Admin", token="ada") == b"x of ada"


def test_unlisted_method_is_denied(gated: Any, tokens: TokenFile) -> None:
    with gated(tokens=tokens, scopes={"/test.Echo/Admin": "control"}) as it:
        assert it.refusal("UnaryUnary").code() is CODE.UNAUTHENTICATED
        assert it.refusal("UnaryUnary", token="ada").code() is CODE.UNAUTHENTICATED
    with gated(scopes={"/test.Echo/Admin": "control"}) as it:
        assert it.refusal("UnaryUnary").code() is CODE.UNIMPLEMENTED


@pytest.mark.parametrize("method", ["/test.Echo/None", "/test.None/UnaryUnary", "/", "no-slash"])
def test_unknown_method_is_unimplemented(gated: Any, tokens: TokenFile, method: str) -> None:
    with gated(tokens=tokens) as it:
        error = failure(lambda: it.channel.unary_unary(method)(b"", timeout=10))
        assert error.code() is CODE.UNIMPLEMENTED


def test_open_method_needs_nothing_and_is_not_counted(gated: Any, tokens: TokenFile) -> None:
    with gated(max_concurrent=1, tokens=tokens) as it, it.waiting(1, token="ada"):
        open_call = it.call("Health", b"wait")
        wait_until(lambda: it.echo.num_waiting == 2)
        assert it.gate.num_active == 1
        assert it.result("Health") == b"x of "
        open_call.cancel()
        wait_until(lambda: it.echo.num_waiting == 1)


def test_open_method_needs_no_token_and_is_counted_by_host(gated: Any, tokens: TokenFile) -> None:
    with gated(max_concurrent=1, tokens=tokens) as it:
        assert it.result("Open") == b"x of "
        call = it.call("Open", b"wait", token="eve")
        wait_until(lambda: it.echo.num_waiting == it.gate.num_active == 1)
        assert it.refusal("Open", token="ada").code() is CODE.RESOURCE_EXHAUSTED
        assert it.rejected == ["peer_limit"]
        assert it.result("UnaryUnary", token="ada") == b"x of ada"
        call.cancel()
        wait_until(lambda: it.gate.num_active == 0)


def test_rejections_are_logged_once_per_second_and_host(
    gated: Any, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = 100.0
    with gated(max_concurrent=1, clock=lambda: now_s) as it, it.waiting(1):
        it.refusal("UnaryUnary")
        now_s = 100.9
        it.refusal("UnaryUnary")
        now_s = 101.0
        it.refusal("UnaryUnary")
    assert len(it.rejected) == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"refused a call of ipv4:{HOST}: 1 calls of this client run, which is the limit"
    ] * 2


def test_hosts_that_are_remembered_for_the_log_are_bounded() -> None:
    now_s = 0.0
    limit = LogLimit(lambda: now_s)
    assert sum(limit.allows(f"host {i}") for i in range(5000)) == len(limit) == 1024
    now_s = 1.0
    assert limit.allows("host 0") and len(limit) == 1


@pytest.mark.parametrize(
    ("identities", "common_name", "name"),
    [(["ada.test"], "ada", b"ada"), (["bob.test", "other"], None, b"bob.test")],
)
def test_certificate_names_its_client(
    gated: Any, tmp_path: Path, identities: list[str], common_name: str | None, name: bytes
) -> None:
    pki = Pki(tmp_path)
    client = pki.ca.issue_cert(*identities, common_name=common_name)
    channel_credentials = grpc.ssl_channel_credentials(
        pki.ca.cert_pem.bytes(), client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes()
    )
    connection = (server_credentials(pki.cert, pki.key, pki.client_ca), channel_credentials)
    with gated(max_concurrent=1, connection=connection) as it:
        assert it.result("UnaryUnary") == b"x of " + name
        with it.waiting(1):
            error = it.refusal("UnaryUnary")
        assert error.code() is CODE.RESOURCE_EXHAUSTED
