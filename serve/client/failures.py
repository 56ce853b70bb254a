"""What a failed call says: the refused fields, when to come back, and a text for people.

All take the `grpc.RpcError` of a sync or async call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]

from bundle.errors import one_line

PUSHBACK_KEY = "grpc-retry-pushback-ms"


def violations(error: grpc.RpcError) -> dict[str, str]:
    """Return the refused fields of a call that failed, path → what is wrong; often none."""
    return {
        violation.field: violation.description
        for detail in _details(error, error_details_pb2.BadRequest)
        for violation in detail.field_violations
    }


def retry_delay_s(error: grpc.RpcError) -> float | None:
    """Return the seconds after which the server wants the call again; None where it says none."""
    for detail in _details(error, error_details_pb2.RetryInfo):
        # Not ToTimedelta, which raises where there are more seconds than it can hold.
        seconds: float = detail.retry_delay.seconds + detail.retry_delay.nanos / 1e9
        return seconds
    return None


def explain(error: grpc.RpcError) -> str:
    """Return status code and text of a call that failed, a line per refused field, and the delay.

    A text that only repeats the fields is left out. None can steer a terminal, or begin a line.
    """
    fields = violations(error)
    text = one_line(_beside(fields, error.details() or ""))
    lines = [f"{error.code().name}: {text}".rstrip()]
    lines += [f"  {one_line(field)} {one_line(told)}" for field, told in fields.items()]
    delay_s = retry_delay_s(error)
    if delay_s is not None:
        lines.append(f"  retry in {delay_s:g} s")
    return "\n".join(lines)


def _beside(fields: dict[str, str], text: str) -> str:
    """Return the text, or "" if it says no more than the fields do."""
    rest = text
    for field, description in fields.items():
        rest = rest.replace(f"{field}: {description}", "").replace(description, "")
    return text if rest.strip("; ") else ""


def _details(error: grpc.RpcError, kind: Any) -> Iterator[Any]:
    """Yield the google.rpc details of a kind; none where something between mangled them."""
    with suppress(DecodeError, ValueError):
        status = rpc_status.from_call(error)
        for each in status.details if status is not None else ():
            detail = kind()
            if each.Unpack(detail):
                yield detail
