"""A server behind a gate whose handlers answer who calls, and calls to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from serve.rpc.credentials.tokens import TokenFile
from serve.rpc.gate import (
    OPEN,
    CallGate,
    PeerLimitError,
    current_client,
    current_peer,
    request_slot,
)
from tests.support.polling import wait_until
from tests.support.rpc.calls import failure

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

    def refusal(self, *args: Any, **options: Any) -> Any:
        return failure(lambda: self.result(*args, **options))

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


@contextmanager
def serve_gated(
    loop: asyncio.AbstractEventLoop,
    max_concurrent: int = 100,
    tokens: TokenFile | None = None,
    scopes: dict[str, str | None] = SCOPES,
    connection: tuple[grpc.ServerCredentials, grpc.ChannelCredentials] | None = None,
    **options: Any,
) -> Iterator[Gated]:
    """Run a server, which is idle again at the end; `max_concurrent` is of each client."""
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
