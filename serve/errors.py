"""Every error that a caller of the server can cause or meet.

    TandemError
    ├── InvalidFieldError          a field is out of bounds, missing or contradictory
    ├── TooLargeError              it can never be served here:
    │   ├── ContextLengthError     the prompt and the tokens asked for exceed the model's context
    │   ├── CompletionLengthError  the same of a completion that is to be scored
    │   ├── TooManyTokensError     a list of token ids alone does
    │   └── NeverFitsError         more samples than the queue and the slots ever hold
    ├── ModelsNotComparableError   a divergence needs two models with the same tokenizer
    ├── ModelNotLoadedError        the asked role is not served here
    ├── UnknownRequestError        no request of that id runs
    ├── StalePolicyError           the traffic policy was changed by someone else meanwhile
    ├── QueueFullError             more waiting work than the server accepts
    ├── DeadlineError              the deadline passed before there was anything to return
    │   └── StalledError           the client does not take what there is to return
    ├── AbortedError               an operator ended the request
    ├── EngineFailedError          the model failed on this request
    └── EngineStoppedError         the engine is down
        └── DrainingError          the whole server takes no new work

Modules that have an error of their own say so; `serve.rpc.statuses` maps all of them to status
codes in one place, and nothing below it knows about gRPC. One more is for the command line alone:
DeviceMissingError, a UserError, at the start of a server.
"""

from __future__ import annotations

from dataclasses import dataclass

from bundle.errors import UserError


class TandemError(Exception):
    """The base of every expected error; its text is safe to show to the client."""


@dataclass(frozen=True)
class FieldViolation:
    """One field that was refused: its path in the request, and what is allowed there."""

    field: str
    description: str


class InvalidFieldError(TandemError):
    """One or more request fields were refused."""

    def __init__(self, *violations: FieldViolation) -> None:
        assert violations, "an InvalidFieldError names at least one field"
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations

    @classmethod
    def of(cls, field: str, description: str) -> InvalidFieldError:
        return cls(FieldViolation(field, description))


class TooLargeError(TandemError):
    """What is asked for can never be served here; `field` is what to make smaller."""

    field: str


class ContextLengthError(TooLargeError):
    """The prompt and the tokens asked for do not fit into the model's context."""

    def __init__(self, field: str, what: str, max_model_len: int) -> None:
        self.field = field
        super().__init__(f"{what} the context of {max_model_len} tokens")


class CompletionLengthError(TooLargeError):
    """A prompt and a completion to be scored do not fit into the model's context."""

    def __init__(self, index: int, num_tokens: int, max_model_len: int) -> None:
        self.field = f"completions[{index}]"
        super().__init__(
            f"prompt and completion have {num_tokens} tokens, the context takes {max_model_len}"
        )


class TooManyTokensError(TooLargeError):
    """A list is longer than the model's context, and was not even looked at."""

    def __init__(self, field: str, num_tokens: int, max_model_len: int) -> None:
        self.field = field
        super().__init__(f"{field} has {num_tokens} elements, the context takes {max_model_len}")


class ModelsNotComparableError(TandemError):
    """A divergence was asked for, but there is no second model with the same tokenizer."""


class ModelNotLoadedError(TandemError):
    """The asked role is not served by this server."""


class UnknownRequestError(TandemError):
    """No request of that id runs here."""


class StalePolicyError(TandemError):
    """The policy is not the one that the change was made for."""


class NeverFitsError(TooLargeError):
    """More samples are asked for than this server could ever hold."""

    field = "sampling.num_samples"

    def __init__(self, num_samples: int, max_samples: int) -> None:
        super().__init__(
            f"num_samples {num_samples} exceeds the {max_samples} samples that run and wait here "
            "at most"
        )


class QueueFullError(TandemError):
    """The waiting queue is full; the request may be sent again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(TandemError):
    """The deadline passed before there was anything to return."""


class StalledError(DeadlineError):
    """The client did not take its responses in time."""


class AbortedError(TandemError):
    """An operator ended the request."""

    TEXT = "the request was aborted by an operator"

    def __init__(self) -> None:
        super().__init__(self.TEXT)


class EngineFailedError(TandemError):
    """The model gave nothing for this request; the text is the engine's."""


class EngineStoppedError(TandemError):
    """The engine is draining or down and takes no new work."""


class DrainingError(EngineStoppedError):
    """The server is on its way out and takes no new work."""


class DeviceMissingError(UserError):
    """The asked device cannot be used here; the server does not fall back on another one."""

    exit_code = 3
