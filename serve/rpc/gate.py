"""Who may call what, and how much at a time: the first thing that a call meets on a listener.

Calls are refused before their message is read. Whoever comes through is counted until the call
ends, whatever ends it, and its name is `current_client` for everything that the handler starts;
`current_peer` is what the limit applies to, so what takes turns at the engines, too.
Handlers of streams count each request with `request_slot`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeAlias

import grpc

from serve.errors import QueueFullError
from serve.rpc.credentials.tokens import SCOPES, TokenFile
from serve.rpc.decoding import decompress_or_keep
from serve.rpc.statuses import Status, abort, status_of

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # no generic at run time
Reason = Literal["unauthenticated", "peer_limit"]
OnRejected = Callable[[Reason, str, grpc.StatusCode], None]
"""Told why a call was refused, of which method ("Generate"), and with which code."""
OnEnded = Callable[[str, grpc.StatusCode], None]
"""Told of which method a call ended before its handler saw a message, and with which code."""

# The authenticated client whose call is being handled; "" for an anonymous one.
current_client: ContextVar[str] = ContextVar("current_client", default="")
current_peer: ContextVar[str] = ContextVar("current_peer", default="")

# Entered by handlers of streams while a request runs; PeerLimitError above the client's limit.
request_slot: ContextVar[Callable[[], AbstractContextManager[None]]] = ContextVar(
    "request_slot", default=nullcontext
)

OPEN = "open"  # as a scope: needs no token, but is counted
RETRY_AFTER_S = 1.0
_DENIED = "denied"  # what an unlisted method needs; no token can have it
MAX_READ_S = 30.0
_MAX_LOGGED_HOSTS = 1024

_NO_CREDENTIALS = Status(
    grpc.StatusCode.UNAUTHENTICATED, "a valid token is needed: authorization: Bearer TOKEN"
)
_NO_SCOPE = Status(grpc.StatusCode.UNAUTHENTICATED, "the token does not allow this call")


class PeerLimitError(QueueFullError):
    """A client has as much running as it may."""


@dataclass(frozen=True, slots=True)
class _Peer:
    """Who calls: a name from token or certificate, "" if anonymous, and from which host."""

    name: str
    host: str

    def __str__(self) -> str:
        return f"client {self.name!r} at {self.host}" if self.name else self.host

    @property
    def key(self) -> str:
        """What limits and turns apply to: a client wherever it calls from, else a host."""
        return f"client {self.name}" if self.name else f"host {self.host}"


class LogLimit:
    """Allows one line per second and host, and so many in all that memory stays bounded."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._logged_s: dict[str, float] = {}  # by host, of the last second, oldest first

    def __len__(self) -> int:
        return len(self._logged_s)

    def allows(self, host: str) -> bool:
        now_s = self._clock()
        while self._logged_s:
            oldest = next(iter(self._logged_s))
            if now_s - self._logged_s[oldest] < 1:
                break
            del self._logged_s[oldest]
        if host in self._logged_s or len(self._logged_s) >= _MAX_LOGGED_HOSTS:
            return False
        self._logged_s[host] = now_s
        return True


class CallGate(grpc.aio.ServerInterceptor):
    """Authenticates the calls of a listener and bounds how many run per client.

    Handlers are coroutine functions or async generator functions. What gRPC refuses by itself does
    not come here and is counted nowhere, a message above `grpc.max_receive_message_length` too.
    """

    def __init__(
        self,
        scopes: Mapping[str, str | None],
        tokens: TokenFile | None,
        max_concurrent_per_peer: int,
        on_rejected: OnRejected,
        on_ended: OnEnded = lambda rpc, code: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`scopes`: method ("/package.Service/Method") or service ("/package.Service/") → scope.

        OPEN there means that no token is needed, None that the calls are not counted either. Other
        methods are denied. Without `tokens` clients are known by their certificates, if the
        listener asks for any.
        """
        assert set(scopes.values()) <= {*SCOPES, OPEN, None}, scopes
        self._scopes = scopes
        self._tokens = tokens
        self._max_concurrent = max_concurrent_per_peer
        self._on_rejected = on_rejected
        self._on_ended = on_ended
        self._log_limit = LogLimit(clock)
        self._num_running: Counter[str] = Counter()
        self._calls: set[asyncio.Task[Any]] = set()
        self._may_run = asyncio.Event()
        self._may_run.set()

    @property
    def num_active(self) -> int:
        """Calls and requests of streams that run; the first request of a stream is its call."""
        return self._num_running.total()

    def hold(self) -> None:
        """Have calls that come from now on wait for `release`."""
        self._may_run.clear()

    def release(self) -> None:
        self._may_run.set()

    async def wait_for_current(self, timeout_s: float) -> None:
        """Wait until every call that runs now has ended, whatever comes meanwhile."""
        if current := set(self._calls):
            await asyncio.wait(current, timeout=timeout_s)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the handler, counted, or one that refuses; None (UNIMPLEMENTED) if there is none.

        Without tokens a method that is not listed is as one that does not exist.
        """
        handler = _decompressing(await continuation(handler_call_details))
        scope = self._scope_of(handler_call_details.method)
        rpc = handler_call_details.method.rpartition("/")[2]
        if handler is None or scope is None:
            return handler
        if scope == OPEN:
            return self._counted(handler, "", rpc)
        if self._tokens is None:
            return None if scope == _DENIED else self._counted(handler, "", rpc)
        token = _bearer_token(handler_call_details.invocation_metadata)
        client = self._tokens.identify(token) if token else None
        if client is None:
            return self._refusing(_NO_CREDENTIALS, "", rpc)
        if scope not in client.scopes:
            return self._refusing(_NO_SCOPE, client.name, rpc)
        return self._counted(handler, client.name, rpc)

    def _scope_of(self, method: str) -> str | None:
        service = method[: method.rfind("/") + 1]
        return self._scopes.get(method, self._scopes.get(service, _DENIED))

    def _refusing(self, status: Status, name: str, rpc: str) -> Handler:
        async def refuse(requests: object, context: Context) -> None:
            self._log_refusal(_Peer(name, _host(context)), status.message)
            await self._reject(context, "unauthenticated", rpc, status)

        # Of any kind of call: with a stream of requests grpc reads none for it.
        return grpc.stream_stream_rpc_method_handler(refuse)

    def _counted(self, handler: Handler, name: str, rpc: str) -> Handler:
        """Return a handler that runs another while its peer stays within the limit.

        It takes a stream of requests, whatever the other takes, since grpc reads a single request
        before it calls: a peer could have any number of them read at once.
        """
        behavior = (
            handler.unary_unary or handler.unary_stream
            or handler.stream_unary or handler.stream_stream
        )  # fmt: skip

        async def run(requests: AsyncIterator[Any], context: Context) -> Any:
            await self._may_run.wait()
            peer = _Peer(name or _certificate_name(context), _host(context))
            self._note_call()
            try:
                self._take(peer)
            except PeerLimitError as error:
                await self._reject(context, "peer_limit", rpc, status_of(error))
            try:
                # Never set back: every call has a context of its own, which ends with it.
                current_client.set(peer.name)
                current_peer.set(peer.key)
                request_slot.set(self._request_slots(peer))
                is_stream = handler.request_streaming
                request = requests if is_stream else await self._read_one(context, rpc)
                return await _call(behavior, request, context)
            finally:
                self._release(peer)

        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(run, handler.request_deserializer, handler.response_serializer)

    def _note_call(self) -> None:
        """Know of the running call until grpc is done with it, its status included."""
        call = asyncio.current_task()
        assert call is not None
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    def _take(self, peer: _Peer) -> None:
        """Count one more that runs; PeerLimitError, logged by then, above the limit."""
        if self._num_running[peer.key] >= self._max_concurrent:
            error = PeerLimitError(
                f"{self._max_concurrent} calls of this client run, which is the limit",
                RETRY_AFTER_S,
            )
            self._log_refusal(peer, str(error))
            raise error
        self._num_running[peer.key] += 1

    def _release(self, peer: _Peer) -> None:
        self._num_running[peer.key] -= 1
        if not self._num_running[peer.key]:
            del self._num_running[peer.key]

    def _request_slots(self, peer: _Peer) -> Callable[[], AbstractContextManager[None]]:
        """Return what counts the requests of one call; one of them has the slot of the call."""
        num_running = 0

        @contextmanager
        def slot() -> Iterator[None]:
            nonlocal num_running
            if num_running:
                self._take(peer)
            num_running += 1
            try:
                yield
            finally:
                num_running -= 1
                if num_running:
                    self._release(peer)

        return slot

    async def _read_one(self, context: Context, rpc: str) -> Any:
        """Return the message of a call that has one; end a call without."""
        try:
            async with asyncio.timeout(MAX_READ_S):
                request = await context.read()
        except TimeoutError:
            text = f"no message came within {MAX_READ_S:g} s"
            await self._end(context, rpc, Status(grpc.StatusCode.DEADLINE_EXCEEDED, text))
        if request is grpc.aio.EOF:
            text = "the call has no message"
            await self._end(context, rpc, Status(grpc.StatusCode.INVALID_ARGUMENT, text))
        return request

    async def _end(self, context: Context, rpc: str, status: Status) -> NoReturn:
        """End a call, and count it if that came to pass: gRPC also says EOF of one that it ends."""
        try:
            await abort(context, status)
        except grpc.aio.AbortError:
            self._on_ended(rpc, status.code)
            raise

    async def _reject(self, context: Context, reason: Reason, rpc: str, status: Status) -> NoReturn:
        self._on_rejected(reason, rpc, status.code)
        await abort(context, status)

    def _log_refusal(self, peer: _Peer, message: str) -> None:
        if self._log_limit.allows(peer.host):
            logger.warning("refused a call of %s: %s", peer, message)


def _decompressing(handler: Handler | None) -> Handler | None:
    """Have a handler that parses by itself get plain messages; ours decompress their own."""
    if handler is None or handler.request_deserializer is None:
        return handler
    parse = handler.request_deserializer
    return handler._replace(  # type: ignore[attr-defined,no-any-return]  # a named tuple
        request_deserializer=lambda data: parse(decompress_or_keep(data))
    )


async def _call(behavior: Any, request: Any, context: Context) -> Any:
    """Await a handler; what it yields is written here, so that it is closed when the call ends."""
    if not inspect.isasyncgenfunction(behavior):
        return await behavior(request, context)
    responses = behavior(request, context)
    try:
        async for response in responses:
            await context.write(response)
    except BaseException:
        await _close(responses)
        raise
    return None


async def _close(responses: AsyncGenerator[Any, None]) -> None:
    """Close a handler to its end: grpc may cancel a call a second time while that goes on."""
    closing = asyncio.ensure_future(responses.aclose())
    try:
        await asyncio.shield(closing)
    except asyncio.CancelledError:
        await closing
        raise


def _bearer_token(metadata: tuple[tuple[str, str | bytes], ...]) -> str | None:
    """Return the token; None if there is none, or more than one.

    >>> _bearer_token((("authorization", "Bearer abc"),))
    'abc'
    >>> _bearer_token((("authorization", "Basic abc"),))
    """
    values = [value for key, value in metadata if key == "authorization"]
    if len(values) != 1 or not isinstance(values[0], str):
        return None
    scheme, _, token = values[0].partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _host(context: Context) -> str:
    """Return the peer without its port: "ipv4:127.0.0.1"; "unix" for all of Unix sockets."""
    return context.peer().rpartition(":")[0]


def _certificate_name(context: Context) -> str:
    """Return the name in the client's certificate, which TLS has verified; "" without one."""
    properties = context.auth_context()
    for key in ("x509_common_name", "x509_subject_alternative_name"):
        for name in filter(None, properties.get(key, ())):
            return name.decode("utf-8", "backslashreplace")
    return ""
