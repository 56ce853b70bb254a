"""What each line of a journal must have, and of which type (meaning: `loadtest.ledger.journal`).

A journal comes from another machine, may be damaged, and the ledger counts with what is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_Role = Literal["student", "teacher"]
_Count = Annotated[int, Field(ge=0)]
_MAX_SAMPLES = 1 << 16  # many times what a server takes: the ledger looks for each
_PassAtK = dict[Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")], float]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Event(_Strict):
    id: str


class _Sent(_Event):
    what: str
    seed: int
    roles: list[_Role]
    num_samples: Annotated[int, Field(ge=0, le=_MAX_SAMPLES)]
    max_tokens: int | None
    streams: bool
    vote: str


class _Tokens(_Event):
    role: _Role
    index: _Count
    position: _Count
    token_ids: list[int]
    logprobs: list[float]
    text: str


class _Divergence(_Strict):
    num_tokens: int
    nonfinite_tokens: int
    large_ratio_tokens: int
    k1_sum: float
    k2_sum: float
    k3_sum: float
    k1_mean: float | None
    k2_mean: float | None
    k3_mean: float | None
    max_abs_log_ratio: float | None
    reference_logprobs: list[float]


class _Sample(_Event):
    role: _Role
    index: _Count
    finish_reason: str
    token_ids: list[int]
    logprobs: list[float]
    text: str
    answer: str | None
    correct: bool | None
    divergence: _Divergence | None
    divergence_error: str


class _Vote(_Strict):
    model_config = ConfigDict(extra="forbid")

    answer: str | None
    share: float | None
    num_valid: int
    num_samples: int
    tie: bool


class _Agreement(_Event):
    student: _Vote | None
    teacher: _Vote | None
    same_answer: bool | None
    student_pass_at_k: _PassAtK
    teacher_pass_at_k: _PassAtK


class _Usage(_Event):
    request_id: str
    seed: int
    completion_tokens: dict[_Role, int]


class _End(_Event):
    code: str


_KINDS: Mapping[str, type[_Event]] = {
    "sent": _Sent,
    "tokens": _Tokens,
    "sample": _Sample,
    "agreement": _Agreement,
    "usage": _Usage,
    "end": _End,
}


def check_event(event: Any) -> None:
    """Raise a ValueError, KeyError or TypeError for what is no event."""
    _KINDS[event["event"]].model_validate(event)
