"""Events of a journal: a whole history of one request, and its parts to break it with."""

from __future__ import annotations

import copy
from typing import Any

Events = list[dict[str, Any]]

# log r of the three tokens: 0.5, -0.25, 0
LOGPROBS = [-1.0, -0.5, -2.0]
REFERENCE_LOGPROBS = [-0.5, -0.75, -2.0]
DIVERGENCE = {
    "num_tokens": 3,
    "nonfinite_tokens": 0,
    "large_ratio_tokens": 0,
    "k1_sum": -0.25,
    "k2_sum": 0.15625,
    "k3_sum": 0.14872127 + 0.02880078,
    "k1_mean": -0.25 / 3,
    "k2_mean": 0.15625 / 3,
    "k3_mean": (0.14872127 + 0.02880078) / 3,
    "max_abs_log_ratio": 0.5,
    "reference_logprobs": REFERENCE_LOGPROBS,
}


def event(kind: str, request_id: str = "a", /, **fields: Any) -> dict[str, Any]:
    return {"id": request_id, "event": kind, **fields}


def tokens(position: int, *token_ids: int, index: int = 0) -> dict[str, Any]:
    logprobs = LOGPROBS[position : position + len(token_ids)]
    fields = {"position": position, "token_ids": [*token_ids], "logprobs": logprobs}
    return event("tokens", role="student", index=index, text="x" * len(token_ids), **fields)


def sample(index: int = 0, *, role: str = "student", **fields: Any) -> dict[str, Any]:
    given = {
        "finish_reason": "FINISH_REASON_STOP",
        "token_ids": [7, 8, 9],
        "logprobs": LOGPROBS,
        "text": "xxx",
        "answer": None,
        "correct": None,
        "divergence": copy.deepcopy(DIVERGENCE),
        "divergence_error": "",
        **fields,
    }
    return event("sample", role=role, index=index, **given)


SENT = event(
    "sent", rpc="Generate", seed=1, prompt_sha256="p", what="w", roles=["student"], num_samples=1,
    max_tokens=4, streams=True, vote="none",
)  # fmt: skip
USAGE = event("usage", request_id="a", seed=1, completion_tokens={"student": 3})
END = event("end", code="OK")
WHOLE: Events = [SENT, tokens(0, 7), tokens(1, 8, 9), sample(), USAGE, END]


def replaced(at: int, *events: dict[str, Any]) -> Events:
    return [*WHOLE[:at], *events, *WHOLE[at + 1 :]]
