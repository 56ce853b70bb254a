"""The gate over real channels: who may call what, how much at a time, and that counts return."""

from __future__ import annotations

import asyncio
import hashlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from google.rpc import error_details_pb2, status_pb2

from serve.rpc import gate as gate_module
from serve.rpc.credentials.tls import server_credentials
from serve.rpc.credentials.tokens import TokenFile
from serve.rpc.gate import (
    OPEN,
    CallGate,
    PeerLimitError,
    current_client,
    current_peer,
    request_slot,
)

CODE = grpc.StatusCode
HOST = "127.0.0.1"
SCOPES = {
    "/test.Echo/": "inference",
    "/test.Echo/Admin": "control",
    "/test.Echo/Open": OPEN,
    "/test.Echo/Health": None,
}
KINDS = ("UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream")


class Echo:
    """Handlers of all kinds that answer who calls; "wait" waits, "fail" and "abort" end badly."""

    def __init__(self) -> None:
        self.num_waiting = 0
        self.num_yielded = 0
        self.padding_bytes = 0
        self.is_closed = False

    async def unary(self, data: bytes, context: Any) -> bytes:
        return await self._answer(data, context)

    async def written(self, data: bytes, context: Any) -> None:
        await context.write(await self._answer(data, context))

    async def yielded(self, data: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            for _ in range(1000 if data == b"flood" else 3):
                self.num_yielded += 1
                yield await self._answer(data, context) + bytes(self.padding_bytes)
        finally:
            await asyncio.sleep(0)
            self.is_closed = True

    async def joined(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b" ".join([await self._answer(data, context) async for data in requests])

    async def mapped(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for data in requests:
            yield await self._answer(data, context)

    async def slotted(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """Answer requests side by side, each in a slot of its own."""

        async def answer(data: bytes) -> None:
            try:
                with request_slot.get()():
                    await context.write(await self._answer(data, context))
            except PeerLimitError as error:
                await context.write(str(error).encode())

        async with asyncio.TaskGroup() as answers:
            async for data in requests:
                answers.create_task(answer(data))

    async def _answer(self, data: bytes, context: Any) -> bytes:
        if data == b"fail":
            raise LookupError
        if data == b"abort":
            await context.abort(CODE.NOT_FOUND, "not here")
        if data == b"wait":
            self.num_waiting += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.num_waiting -= 1
        name = await asyncio.create_task(_client_of_task())
        return data + b" of " + name.encode()

    def handler(self) -> grpc.GenericRpcHandler:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers = {
            "UnaryUnary": unary(self.unary),
            "UnaryStream": stream(self.yielded),
            "Written": stream(self.written),
            "StreamUnary": grpc.stream_unary_rpc_method_handler(self.joined),
            "StreamStream": grpc.stream_stream_rpc_method_handler(self.mapped),
            "Decoded": unary(self.unary, bytes.upper, bytes.lower),
            "Slotted": grpc.stream_stream_rpc_method_handler(self.slotted),
            "Admin": unary(self.unary),
            "Open": unary(self.unary),
            "Health": unary(self.unary),
        }
        return grpc.method_handlers_generic_handler("test.Echo", handlers)


async def _client_of_task() -> str:
    name = current_client.get()
    assert not name or current_peer.get() == f"client {name}"
    return name


class Gated:
    """A server behind a gate, and calls to it."""

    def __init__(self, gate: CallGate, echo: Echo, channel: grpc.Channel, rejected: list[str],
                 ended: list[Any]) -> None:  # fmt: skip
        self.gate, self.echo, self.channel = gate, echo, channel
        self.rejected, self.ended = rejected, ended

    def call(self, rpc: str, data: bytes = b"x", token: str | None = None, **options: Any) -> Any:
        """Begin a call; `result` waits for its responses."""
        metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        path = rpc if rpc.startswith("/") else f"/test.Echo/{rpc}"
        options = {"metadata": metadata, "timeout": 10, **options}
        if rpc.startswith("Stream"):
            return self.channel.stream_stream(path)(iter([data]), **options)
        return self.channel.unary_stream(path)(data, **options)

    def result(self, *args: Any, **options: Any) -> bytes:
        return b" ".join(self.call(*args, **options))

    def refusal(self, *args: Any, **options: Any) -> grpc.RpcError:
        with pytest.raises(grpc.RpcError) as caught:
            self.result(*args, **options)
        return caught.value

    @contextmanager
    def waiting(self, num_calls: int, **options: Any) -> Iterator[None]:
        """Have calls run, and cancel them."""
        before = self.echo.num_waiting
        calls = [self.call("UnaryUnary", b"wait", **options) for _ in range(num_calls)]
        wait_until(lambda: self.echo.num_waiting == before + num_calls)
        yield
        for call in calls:
            call.cancel()
        wait_until(lambda: self.echo.num_waiting == before)


def wait_until(is_true: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < until_s, "it did not come true in time"
        time.sleep(0.001)


@pytest.fixture
def gated(loop: asyncio.AbstractEventLoop) -> Any:
    """`with gated(max_concurrent=2, tokens=...) as it`: a server, idle again at the end."""

    @contextmanager
    def serve(
        max_concurrent: int = 100,
        tokens: TokenFile | None = None,
        scopes: dict[str, str | None] = SCOPES,
        connection: tuple[grpc.ServerCredentials, grpc.ChannelCredentials] | None = None,
        **options: Any,
    ) -> Iterator[Gated]:
        echo, rejected, ended = Echo(), [], []
        gate = CallGate(
            scopes,
            tokens,
            max_concurrent,
            lambda reason, rpc, code: rejected.append(reason),
            lambda rpc, code: ended.append((rpc, code)),
            **options,
        )

        async def start() -> tuple[grpc.aio.Server, int]:
            server = grpc.aio.server(interceptors=[gate])
            server.add_generic_rpc_handlers((echo.handler(),))
            port = (
                server.add_secure_port(f"{HOST}:0", connection[0])
                if connection
                else server.add_insecure_port(f"{HOST}:0")
            )
            await server.start()
            return server, port

        server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
        target = f"{HOST}:{port}"
        try:
            with (
                grpc.secure_channel(target, connection[1])
                if connection
                else grpc.insecure_channel(target)
            ) as channel:
                yield Gated(gate, echo, channel, rejected, ended)
                wait_until(lambda: gate.num_active == 0)
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(10)

    return serve


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    """The clients ada, with all scopes, and bob, who may not administer; their names are tokens."""
    path = tmp_path / "tokens"
    scopes = {"ada": "inference,control", "bob": "inference"}
    path.write_text(
        "".join(f"{n} {hashlib.sha256(n.encode()).hexdigest()} {s}\n" for n, s in scopes.items())
    )
    return TokenFile(path)


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


def test_without_tokens_the_client_is_anonymous(gated: Any) -> None:
    with gated() as it:
        assert it.result("UnaryUnary") == b"x of "


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_token_is_refused_before_the_message_is_read(
    gated: Any, tokens: TokenFile, kind: str
) -> None:
    may_send = threading.Event()

    def never() -> Iterator[bytes]:
        may_send.wait(10)
        yield from ()

    with gated(tokens=tokens) as it:
        method = it.channel.stream_stream(f"/test.Echo/{kind}")
        with pytest.raises(grpc.RpcError) as caught:
            next(method(never(), metadata=(("authorization", "Bearer eve"),), timeout=10))
        may_send.set()
        assert caught.value.code() is CODE.UNAUTHENTICATED


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
        with pytest.raises(grpc.RpcError) as caught:
            it.channel.unary_unary(method)(b"", timeout=10)
        assert caught.value.code() is CODE.UNIMPLEMENTED


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


def test_requests_of_a_stream_count_as_calls(gated: Any) -> None:
    requests: queue.Queue[bytes | None] = queue.Queue()
    with gated(max_concurrent=2) as it:
        stream = it.channel.stream_stream("/test.Echo/Slotted")(iter(requests.get, None))
        wait_until(lambda: it.gate.num_active == 1)
        requests.put(b"x")  # ends before the next one comes: they have the slot of the call
        assert next(stream) == b"x of "
        requests.put(b"wait")
        wait_until(lambda: it.echo.num_waiting == 1)
        assert it.gate.num_active == 1
        requests.put(b"wait")
        wait_until(lambda: it.echo.num_waiting == it.gate.num_active == 2)
        assert it.refusal("UnaryUnary").code() is CODE.RESOURCE_EXHAUSTED
        requests.put(b"x")
        assert next(stream) == b"2 calls of this client run, which is the limit"
        assert it.gate.num_active == 2
        assert it.rejected == ["peer_limit"]  # of the call alone: the handler tells of requests
        stream.cancel()
        wait_until(lambda: it.gate.num_active == 0)
        requests.put(None)
        with it.waiting(2):
            assert it.gate.num_active == 2


def test_end_waits_for_calls_that_run_and_for_none_that_come_later(
    gated: Any, loop: asyncio.AbstractEventLoop
) -> None:
    with gated() as it:
        earlier = it.call("UnaryUnary", b"wait")
        wait_until(lambda: it.echo.num_waiting == 1)
        ending = asyncio.run_coroutine_threadsafe(it.gate.wait_for_current(30), loop)
        with it.waiting(1):
            wait_until(lambda: it.gate.num_active == 2)
            assert not ending.done()
            earlier.cancel()
            ending.result(10)
            assert it.gate.num_active == 1


def test_calls_that_are_held_run_when_they_are_released(
    gated: Any, loop: asyncio.AbstractEventLoop
) -> None:
    with gated() as it, it.waiting(1):  # one that runs already goes on
        loop.call_soon_threadsafe(it.gate.hold)
        calls = [it.call("Open", b"x") for _ in range(3)]
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.1), loop).result(10)
        assert not any(call.done() for call in calls) and it.gate.num_active == 1
        assert it.result("Health") == b"x of "
        loop.call_soon_threadsafe(it.gate.release)
        assert [b"".join(call) for call in calls] == 3 * [b"x of "]


def test_end_waits_no_longer_than_it_is_told(gated: Any, loop: asyncio.AbstractEventLoop) -> None:
    with gated() as it, it.waiting(1):
        asyncio.run_coroutine_threadsafe(it.gate.wait_for_current(0.05), loop).result(10)
        assert it.gate.num_active == 1


def test_slots_that_requests_leave_are_those_of_the_next(gated: Any) -> None:
    with gated(max_concurrent=1) as it:
        requests = it.channel.stream_stream("/test.Echo/Slotted")
        for _ in range(3):
            assert list(requests(iter([b"x"]), timeout=10)) == [b"x of "]
            wait_until(lambda: it.gate.num_active == 0)


def test_calls_above_the_limit_are_told_when_to_come_again(gated: Any) -> None:
    with gated(max_concurrent=2) as it:
        with it.waiting(2):
            assert it.gate.num_active == 2
            error = it.refusal("UnaryUnary")
            assert it.gate.num_active == 2
        assert error.code() is CODE.RESOURCE_EXHAUSTED
        metadata = dict(error.trailing_metadata())
        assert metadata["grpc-retry-pushback-ms"] == "1000"
        status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
        assert status.details[0].Is(error_details_pb2.RetryInfo.DESCRIPTOR)
        assert it.rejected == ["peer_limit"]
        wait_until(lambda: it.gate.num_active == 0)
        assert it.result("UnaryUnary") == b"x of "


def test_limit_is_per_client_not_per_connection(gated: Any, tokens: TokenFile) -> None:
    with gated(max_concurrent=1, tokens=tokens) as it, it.waiting(1, token="ada"):
        assert it.refusal("UnaryUnary", token="ada").code() is CODE.RESOURCE_EXHAUSTED
        with it.waiting(1, token="bob"):
            assert it.gate.num_active == 2


def test_calls_whose_message_does_not_come_count_too(gated: Any) -> None:
    may_send = threading.Event()

    def late() -> Iterator[bytes]:
        may_send.wait(10)
        yield b"late"

    with gated(max_concurrent=1) as it:
        call = it.channel.stream_stream("/test.Echo/UnaryUnary")(late(), timeout=10)
        wait_until(lambda: it.gate.num_active == 1)
        assert it.refusal("UnaryUnary").code() is CODE.RESOURCE_EXHAUSTED
        may_send.set()
        assert list(call) == [b"late of "]


def test_message_that_never_comes_ends_the_call(
    gated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "_MAX_READ_S", 0.01)
    may_send = threading.Event()

    def never() -> Iterator[bytes]:
        may_send.wait(10)
        yield from ()

    with gated() as it:
        with pytest.raises(grpc.RpcError) as caught:
            next(it.channel.stream_stream("/test.Echo/UnaryUnary")(never()))
        may_send.set()
        assert caught.value.code() is CODE.DEADLINE_EXCEEDED
        assert caught.value.details() == "no message came within 0.01 s"
        wait_until(lambda: it.gate.num_active == 0)
        assert (it.ended, it.rejected) == ([("UnaryUnary", CODE.DEADLINE_EXCEEDED)], [])


@pytest.mark.parametrize("kind", ["UnaryUnary", "UnaryStream"])
def test_call_without_a_message_is_an_invalid_argument(gated: Any, kind: str) -> None:
    with gated() as it:
        with pytest.raises(grpc.RpcError) as caught:
            next(it.channel.stream_stream(f"/test.Echo/{kind}")(iter(()), timeout=10))
        assert caught.value.code() is CODE.INVALID_ARGUMENT
        wait_until(lambda: it.gate.num_active == 0)
        assert (it.ended, it.rejected) == ([(kind, CODE.INVALID_ARGUMENT)], [])


def test_too_large_message_does_not_come_to_the_gate(gated: Any) -> None:
    with gated() as it:
        error = it.refusal("UnaryUnary", bytes(5 << 20))
        assert error.code() is CODE.RESOURCE_EXHAUSTED
        wait_until(lambda: it.gate.num_active == 0)
        assert it.ended == it.rejected == []


@pytest.mark.parametrize("kind", [*KINDS, "Written"])
def test_count_returns_however_a_call_ends(
    gated: Any, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with gated(max_concurrent=1) as it:
        for data, code in ((b"fail", CODE.UNKNOWN), (b"abort", CODE.NOT_FOUND)):
            assert it.refusal(kind, data).code() is code
            wait_until(lambda: it.gate.num_active == 0)
        error = it.refusal(kind, b"wait", timeout=0.05)
        assert error.code() is CODE.DEADLINE_EXCEEDED
        wait_until(lambda: it.gate.num_active == 0)
        call = it.call(kind, b"wait")
        wait_until(lambda: it.gate.num_active == 1)
        call.cancel()
        wait_until(lambda: it.gate.num_active == 0)
        assert it.result(kind).startswith(b"x of ")
    assert "suppressed" not in caplog.text


def test_cancel_while_the_message_is_read_leaves_no_trace(
    gated: Any, caplog: pytest.LogCaptureFixture
) -> None:
    may_send = threading.Event()

    def never() -> Iterator[bytes]:
        may_send.wait(10)
        yield from ()

    with gated() as it:
        for _ in range(50):
            call = it.channel.stream_stream("/test.Echo/UnaryUnary")(never(), timeout=10)
            wait_until(lambda: it.gate.num_active == 1)
            call.cancel()
            wait_until(lambda: it.gate.num_active == 0)
        may_send.set()
        assert it.result("UnaryUnary") == b"x of "
        assert it.ended == []
    assert caplog.records == []


def test_generator_that_its_reader_left_is_closed_before_the_count_returns(gated: Any) -> None:
    with gated() as it:
        it.echo.padding_bytes = 1 << 20  # more than goes out before the client reads
        call = it.call("UnaryStream", b"flood")
        wait_until(lambda: it.echo.num_yielded > 0)
        call.cancel()
        wait_until(lambda: it.gate.num_active == 0)
        assert it.echo.is_closed


def test_storm_of_refusals_and_cancels_leaves_no_count(gated: Any, tokens: TokenFile) -> None:
    with gated(max_concurrent=5, tokens=tokens) as it:
        calls = [
            it.call(KINDS[i % 4], b"wait" if i % 3 else b"x", token=("ada", "bob", "eve")[i % 3])
            for i in range(300)
        ]
        for call in calls:
            call.cancel()
        wait_until(lambda: it.gate.num_active == 0)
        with it.waiting(5, token="ada"), it.waiting(5, token="bob"):
            assert it.gate.num_active == 10


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
    gate = CallGate({}, None, 1, print, clock=lambda: now_s)
    assert sum(gate._may_log(f"host {i}") for i in range(5000)) == 1024
    now_s = 1.0
    assert gate._may_log("host 0")
    assert len(gate._logged_s) == 1


@pytest.mark.parametrize(
    ("identities", "common_name", "name"),
    [(["ada.test"], "ada", b"ada"), (["bob.test", "other"], None, b"bob.test")],
)
def test_certificate_names_its_client(
    gated: Any, tmp_path: Path, identities: list[str], common_name: str | None, name: bytes
) -> None:
    ca = trustme.CA()
    issued, client = ca.issue_cert(HOST), ca.issue_cert(*identities, common_name=common_name)
    cert, key, client_ca = tmp_path / "cert", tmp_path / "key", tmp_path / "ca"
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    ca.cert_pem.write_to_path(client_ca)
    channel_credentials = grpc.ssl_channel_credentials(
        ca.cert_pem.bytes(), client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes()
    )
    connection = (server_credentials(cert, key, client_ca), channel_credentials)
    with gated(max_concurrent=1, connection=connection) as it:
        assert it.result("UnaryUnary") == b"x of " + name
        with it.waiting(1):
            error = it.refusal("UnaryUnary")
        assert error.code() is CODE.RESOURCE_EXHAUSTED
