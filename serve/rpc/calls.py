"""One call while it runs: its clock and labels, how it is counted, and how its end is told.

Every handler of every service runs inside `CallGuard.watch`: it counts the call once, under the
code it ends with, and turns exceptions into a `Status`. Nothing else in `serve` counts calls.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

import grpc

from serve.engine.sequence import FinishReason
from serve.errors import DrainingError, QueueFullError, StalledError
from serve.metrics.server_metrics import ServerMetrics
from serve.pair.arm import reason_to_give_up
from serve.pair.request import OTHER_TASK, GenerationSpec
from serve.rpc.gate import PeerLimitError
from serve.rpc.statuses import Status, abort, status_of

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

serialize = methodcaller("SerializeToString")


@dataclass(slots=True)
class Call:
    """One call: when it came, by when it must end (both monotonic), whose it is, and its labels.

    `tenant` is the authenticated client's name, "" for anonymous ones; tenants share nothing.
    Engines serve a `peer`, such a client or a host, in turns with others.
    """

    rpc: str
    arrival_s: float
    deadline_s: float
    tenant: str = ""
    peer: str = ""
    request_id: str = ""
    route: str = "none"
    task: str = OTHER_TASK

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.arrival_s

    def label(self, spec: GenerationSpec) -> None:
        self.request_id = spec.request_id
        self.route, self.task = spec.route.value, spec.evaluation.task

    def code_when_cancelled(self) -> grpc.StatusCode:
        is_over = reason_to_give_up(self.deadline_s) is FinishReason.DEADLINE
        return grpc.StatusCode.DEADLINE_EXCEEDED if is_over else grpc.StatusCode.CANCELLED


class CallFailedError(Exception):
    """A call that cannot be answered; the status says why."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.message)
        self.status = status


Method = Callable[[Call, bytes, Context], Awaitable[Any]]
Behavior = Callable[[bytes, Context], Awaitable[Any]]


class CallGuard:
    """Begins calls and watches their ends; one per server."""

    def __init__(
        self,
        metrics: ServerMetrics,
        max_timeout_s: float,
        tenant: Callable[[], str] = str,
        peer: Callable[[], str] = str,
        *,
        max_stall_s: float = 30.0,
        log_requests: bool = False,
    ) -> None:
        """`tenant` and `peer` say whose the call is that is being handled (see `Call`)."""
        self._metrics = metrics
        self._max_timeout_s = max_timeout_s
        self._tenant = tenant
        self._peer = peer
        self._max_stall_s = max_stall_s
        self._log_requests = log_requests

    def begin(self, rpc: str, remaining_s: float | None) -> Call:
        """Start a call's clock; no call may take longer than the server's own limit."""
        timeout_s = self._max_timeout_s
        if remaining_s is not None:
            timeout_s = min(timeout_s, remaining_s)
        arrival_s = time.monotonic()
        return Call(rpc, arrival_s, arrival_s + timeout_s, self._tenant(), self._peer())

    @contextmanager
    def watch(self, call: Call) -> Iterator[None]:
        """Count how the block ends.

        Raises:
            CallFailedError: the block raised; unexpected errors are logged by then.
        """
        code = grpc.StatusCode.OK
        try:
            yield
        except asyncio.CancelledError:
            code = call.code_when_cancelled()
            raise
        except Exception as error:  # mapped, logged if unexpected, and told: nothing is lost
            status = status_of(error)
            code = status.code
            self._count_rejection(error)
            raise CallFailedError(status) from error
        finally:
            self._metrics.requests.labels(call.rpc, call.route, code.name, call.task).inc()
            if self._log_requests:
                self._log(call, code)

    def surround(self, rpc: str, method: Method) -> Behavior:
        """Return a handler, for raw bytes, of a call that `method` answers or writes."""

        async def handle(data: bytes, context: Context) -> Any:
            call = self.begin(rpc, context.time_remaining())
            try:
                with self.watch(call):
                    return await method(call, data, context)
            except CallFailedError as failed:
                await abort(context, failed.status)

        return handle

    async def write(self, context: Context, response: Any) -> None:
        """Send a response of a stream, as soon as the client has room for it.

        Raises:
            StalledError: it had none for too long. Nothing else ends such a call: its engines are
                done with it, and its client may have no deadline.
            CancelledError: the client is gone; grpc says so first to who waits for its room.
        """
        try:
            async with asyncio.timeout(self._max_stall_s):
                await context.write(response)
        except TimeoutError:
            raise StalledError(
                f"the client took none of its responses for {self._max_stall_s:g} s"
            ) from None
        except grpc.aio.InternalError:
            raise asyncio.CancelledError from None

    def _count_rejection(self, error: Exception) -> None:
        if isinstance(error, PeerLimitError):
            self._metrics.admission_rejections.labels("peer_limit").inc()
        elif isinstance(error, QueueFullError):
            self._metrics.admission_rejections.labels("queue_full").inc()
        elif isinstance(error, DrainingError):
            self._metrics.admission_rejections.labels("draining").inc()

    def _log(self, call: Call, code: grpc.StatusCode) -> None:
        logger.info(
            "%s %s route=%s tenant=%s %s %.3f s",
            call.rpc, call.request_id or "-", call.route, call.tenant or "-", code.name,
            call.seconds,
        )  # fmt: skip


def unary(behavior: Behavior) -> grpc.RpcMethodHandler[bytes, Any]:
    """Return the handler of a call with one response; without a deserializer it gets raw bytes."""
    return grpc.unary_unary_rpc_method_handler(behavior, None, serialize)


def streaming(behavior: Behavior) -> grpc.RpcMethodHandler[bytes, Any]:
    """As `unary`, for a handler that writes its responses."""
    return grpc.unary_stream_rpc_method_handler(behavior, None, serialize)
