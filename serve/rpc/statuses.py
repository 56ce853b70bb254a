"""The one place where exceptions become gRPC statuses, with google.rpc details for machines."""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]

from serve.client.failures import PUSHBACK_KEY
from serve.errors import (
    AbortedError,
    DeadlineError,
    EngineFailedError,
    EngineStoppedError,
    InvalidFieldError,
    ModelNotLoadedError,
    ModelsNotComparableError,
    QueueFullError,
    StalePolicyError,
    TooLargeError,
    UnknownRequestError,
)
from serve.pair.answers.equivalence import SymbolicUnavailableError
from serve.rpc.decoding import MalformedMessageError

logger = logging.getLogger(__name__)

# A draining server is gone, or replaced, after about this long.
STOPPED_RETRY_AFTER_S = 1.0
# Text and details travel in HTTP/2 trailers, of which a client takes 8 KiB by default.
_MAX_CHARS = 800
# A status waits for the response before it, and that one for room at the client.
_MAX_ABORT_S = 1.0
_MAX_DETAIL_CHARS = 2400  # of all fields together

STATUS_CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (MalformedMessageError, grpc.StatusCode.INVALID_ARGUMENT),
    (InvalidFieldError, grpc.StatusCode.INVALID_ARGUMENT),
    (TooLargeError, grpc.StatusCode.OUT_OF_RANGE),
    (ModelsNotComparableError, grpc.StatusCode.FAILED_PRECONDITION),
    (StalePolicyError, grpc.StatusCode.FAILED_PRECONDITION),
    (SymbolicUnavailableError, grpc.StatusCode.FAILED_PRECONDITION),
    (ModelNotLoadedError, grpc.StatusCode.NOT_FOUND),
    (UnknownRequestError, grpc.StatusCode.NOT_FOUND),
    (QueueFullError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (EngineStoppedError, grpc.StatusCode.UNAVAILABLE),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (TimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (AbortedError, grpc.StatusCode.CANCELLED),
)


@dataclass(frozen=True, slots=True)
class Status:
    """How a call ends: a code, a text that is safe to show, and details."""

    code: grpc.StatusCode
    message: str
    details: tuple[Message, ...] = ()
    retry_after_s: float | None = None

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        details = list(self.details)
        pushback: tuple[tuple[str, str | bytes], ...] = ()
        if self.retry_after_s is not None:
            delay = Duration()
            delay.FromNanoseconds(round(self.retry_after_s * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
            pushback = ((PUSHBACK_KEY, str(round(self.retry_after_s * 1e3))),)
        if not details:
            return pushback
        rich = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in details:
            rich.details.add().Pack(detail)
        return (*pushback, *rpc_status.to_status(rich).trailing_metadata)


def status_of(error: Exception) -> Status:
    """Map an exception; what is not expected is INTERNAL, its traceback in the log alone."""
    code = next((code for kind, code in STATUS_CODES if isinstance(error, kind)), None)
    if code is None:
        text = str(error) if isinstance(error, EngineFailedError) else "internal error"
        return _internal(text, error)
    return Status(code, _cut(str(error), _MAX_CHARS), _violations(error), _retry_after_s(error))


def _cut(text: str, max_chars: int) -> str:
    """Keep a text that may hold the client's own within what trailers can carry."""
    return text if len(text) <= max_chars else f"{text[:max_chars]}..."


async def abort(context: grpc.aio.ServicerContext[Any, Any], status: Status) -> NoReturn:
    """End the call with a status, without waiting for a client that takes nothing.

    Such a client is told when it reads on; CancelledError then, as where a client is gone.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(_MAX_ABORT_S):
            await context.abort(status.code, status.message, status.trailing_metadata())
    raise asyncio.CancelledError


def _internal(text: str, error: Exception) -> Status:
    error_id = secrets.token_hex(8)
    logger.error("error id %s", error_id, exc_info=error)
    return Status(grpc.StatusCode.INTERNAL, f"{text}; error id {error_id}")


def _violations(error: Exception) -> tuple[Message, ...]:
    if isinstance(error, InvalidFieldError):
        fields = [(v.field, v.description) for v in error.violations]
    elif isinstance(error, TooLargeError):
        fields = [(error.field, str(error))]
    else:
        return ()
    field_violation = error_details_pb2.BadRequest.FieldViolation
    max_chars = _MAX_DETAIL_CHARS // len(fields)
    return (
        error_details_pb2.BadRequest(
            field_violations=[
                field_violation(field=_cut(f, max_chars), description=_cut(d, max_chars))
                for f, d in fields
            ]
        ),
    )


def _retry_after_s(error: Exception) -> float | None:
    if isinstance(error, QueueFullError):
        return error.retry_after_s
    return STOPPED_RETRY_AFTER_S if isinstance(error, EngineStoppedError) else None
