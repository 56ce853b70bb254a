from __future__ import annotations

import grpc
import pytest
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from serve.client.failures import explain, retry_delay_s, violations

CODE = grpc.StatusCode


def failed(code: CODE, text: str, *details: Message) -> grpc.aio.AioRpcError:
    status = status_pb2.Status(code=code.value[0], message=text)
    for detail in details:
        status.details.add().Pack(detail)
    trailers = grpc.aio.Metadata(("grpc-status-details-bin", status.SerializeToString()))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers, text)


def refused(field: str, description: str) -> Message:
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
    return error_details_pb2.BadRequest(field_violations=[violation])


RETRY = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (failed(CODE.INTERNAL, "error id ab"), "INTERNAL: error id ab"),
        (failed(CODE.UNAVAILABLE, "draining", RETRY), "UNAVAILABLE: draining\n  retry in 1.5 s"),
        (failed(CODE.UNKNOWN, ""), "UNKNOWN:"),
        (
            failed(CODE.INVALID_ARGUMENT, "top_p: is 2", refused("top_p", "is 2")),
            "INVALID_ARGUMENT:\n  top_p is 2",
        ),
        (
            failed(CODE.OUT_OF_RANGE, "9 exceed 8", refused("max_tokens", "9 exceed 8")),
            "OUT_OF_RANGE:\n  max_tokens 9 exceed 8",
        ),
        (
            failed(CODE.INVALID_ARGUMENT, "is 2; see the manual", refused("top_p", "is 2"), RETRY),
            "INVALID_ARGUMENT: is 2; see the manual\n  top_p is 2\n  retry in 1.5 s",
        ),
    ],
)
def test_explanation_drops_nothing_and_repeats_nothing(error: grpc.RpcError, text: str) -> None:
    assert explain(error) == text


def test_delay_and_fields_are_found_beside_each_other() -> None:
    error = failed(CODE.UNAVAILABLE, "", RETRY, refused("a", "b"), refused("c", "d"))
    assert retry_delay_s(error) == 1.5
    assert violations(error) == {"a": "b", "c": "d"}


def test_failure_without_details_has_neither() -> None:
    error = grpc.aio.AioRpcError(CODE.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "gone")
    assert (violations(error), retry_delay_s(error)) == ({}, None)


def test_mangled_details_leave_the_text() -> None:
    trailers = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff"))
    error = grpc.aio.AioRpcError(CODE.INTERNAL, grpc.aio.Metadata(), trailers, "broken")
    assert explain(error) == "INTERNAL: broken"


def test_details_that_are_damaged_or_too_large_raise_nothing() -> None:
    status = status_pb2.Status(details=[any_pb2.Any()])
    status.details[0].Pack(RETRY)
    status.details[0].value = b"\xff"
    trailers = grpc.aio.Metadata(("grpc-status-details-bin", status.SerializeToString()))
    damaged = grpc.aio.AioRpcError(CODE.UNAVAILABLE, grpc.aio.Metadata(), trailers, "full")
    assert explain(damaged) == "UNAVAILABLE: full"
    late = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=2**62))
    assert retry_delay_s(failed(CODE.UNAVAILABLE, "", late)) == 2.0**62


def test_what_a_server_says_steers_no_terminal_and_begins_no_line() -> None:
    error = failed(CODE.INVALID_ARGUMENT, "a\nb", refused("c\x1b[2J", "d\r"))
    assert explain(error) == "INVALID_ARGUMENT: 'a\\nb'\n  'c\\x1b[2J' 'd\\r'"
