import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from serve.errors import (
    AbortedError,
    CompletionLengthError,
    ContextLengthError,
    DeadlineError,
    EngineFailedError,
    EngineStoppedError,
    InvalidFieldError,
    ModelNotLoadedError,
    ModelsNotComparableError,
    NeverFitsError,
    QueueFullError,
    StalePolicyError,
    UnknownRequestError,
)
from serve.rpc.decoding import MalformedMessageError
from serve.rpc.statuses import status_of

CODE = grpc.StatusCode


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MalformedMessageError(), CODE.INVALID_ARGUMENT),
        (InvalidFieldError.of("a", "b"), CODE.INVALID_ARGUMENT),
        (ContextLengthError("prompt", "2 tokens exceed", 1), CODE.OUT_OF_RANGE),
        (CompletionLengthError(0, 3, 2), CODE.OUT_OF_RANGE),
        (NeverFitsError(3, 2), CODE.OUT_OF_RANGE),
        (StalePolicyError(), CODE.FAILED_PRECONDITION),
        (UnknownRequestError(), CODE.NOT_FOUND),
        (AbortedError(), CODE.CANCELLED),
        (ModelsNotComparableError(), CODE.FAILED_PRECONDITION),
        (ModelNotLoadedError(), CODE.NOT_FOUND),
        (QueueFullError("", 2.5), CODE.RESOURCE_EXHAUSTED),
        (EngineStoppedError(), CODE.UNAVAILABLE),
        (DeadlineError(), CODE.DEADLINE_EXCEEDED),
        (TimeoutError(), CODE.DEADLINE_EXCEEDED),
        (EngineFailedError(), CODE.INTERNAL),
        (ZeroDivisionError(), CODE.INTERNAL),
    ],
)
def test_every_error_has_its_code(error: Exception, code: grpc.StatusCode) -> None:
    assert status_of(error).code is code


def test_retry_delay_is_in_details_and_trailer() -> None:
    metadata = dict(status_of(QueueFullError("full", 2.5)).trailing_metadata())
    assert metadata["grpc-retry-pushback-ms"] == "2500"
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    info = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert info.retry_delay.ToMilliseconds() == 2500


def test_unexpected_error_keeps_its_text_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    status = status_of(KeyError("secret"))
    error_id = status.message.removeprefix("internal error; error id ")
    assert "secret" not in status.message
    assert error_id in caplog.text and "secret" in caplog.text


def test_status_without_details_has_no_trailer() -> None:
    assert status_of(ModelNotLoadedError("x")).trailing_metadata() == ()
