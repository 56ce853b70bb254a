"""What a valid request is: its bounds (`Limits`), and its parts with every default filled in.

`serve.rpc.validation` makes them from messages; everything behind it relies on them.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from estimators.answers import ANSWER_FORMATS
from serve.pair.routing import Route
from serve.pair.served import Role
from serve.sampling.params import SamplingParams

OTHER_TASK = "other"


@dataclass(frozen=True, slots=True)
class Range:
    """An inclusive range of finite numbers; with `or_zero`, 0 is allowed beside it."""

    low: float
    high: float
    or_zero: bool = False

    def allows(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        return self.low <= value <= self.high or (self.or_zero and value == 0)

    def __str__(self) -> str:
        return f"{'0, or ' if self.or_zero else ''}{self.low:.10g} to {self.high:.10g}"


@dataclass(frozen=True, slots=True)
class Limits:
    """Every bound of a request. The first two are the models': the lesser of those loaded.

    `missing_token_ids` are below `vocab_size` and no token's.
    """

    max_model_len: int
    vocab_size: int
    missing_token_ids: frozenset[int] = frozenset()
    tasks: frozenset[str] = frozenset()
    answer_formats: tuple[str, ...] = tuple(ANSWER_FORMATS)
    max_queued_samples: int = 1 << 31
    max_completion_tokens: int = (1 << 32) - 1
    max_prompt_bytes: int = 1 << 20
    max_messages: int = 256
    max_completions: int = 64
    num_samples: Range = Range(1, 64)
    temperature: Range = Range(0.01, 10, or_zero=True)
    scoring_temperature: Range = Range(0.01, 10)
    top_p: Range = Range(1e-6, 1)
    min_p: Range = Range(0, 1)
    repetition_penalty: Range = Range(0.1, 10)
    top_logprobs: Range = Range(0, 20)
    max_stop_strings: int = 16
    max_stop_bytes: int = 256
    max_stop_token_ids: int = 64
    max_pass_at_k: int = 16
    max_reference_bytes: int = 4096
    max_task_bytes: int = 64


class Basis(enum.Enum):
    """At which temperature log-probabilities are reported: the request's, or 1."""

    TEMPERED = "tempered"
    RAW = "raw"


class AnswerMatch(enum.Enum):
    """When two answers are the same: by canonical form, or where they are equivalent as well."""

    EXACT = "exact"
    SYMBOLIC = "symbolic"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in the one form it was given in; only of `messages` the final one is continued."""

    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    continue_final_message: bool = False
    token_ids: tuple[int, ...] = ()

    @property
    def field(self) -> str:
        """The field that it came in, for errors."""
        if self.token_ids:
            return "prompt_token_ids.ids"
        return "messages" if self.messages else "prompt"


@dataclass(frozen=True, slots=True)
class DivergenceSpec:
    """Whether (None: by default) and how the other model scores."""

    enabled: bool | None = None
    basis: Basis = Basis.TEMPERED
    per_token: bool = False
    exact: bool = False


@dataclass(frozen=True, slots=True)
class EvaluationSpec:
    """How answers are extracted and judged; `answer_format` "none" extracts nothing."""

    answer_format: str = "none"
    reference_answer: str | None = None
    pass_at_k: tuple[int, ...] = ()
    task: str = OTHER_TASK
    answer_match: AnswerMatch = AnswerMatch.EXACT


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """What the client wants to see."""

    stream: bool = True
    logprobs: bool = True
    top_logprobs: int = 0
    text: bool = True
    processed_logprobs: bool = False
    prompt_token_ids: bool = False


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """A valid Generate or Compare request.

    `is_max_tokens_default`: nobody asked for so many, so that there may be less room.
    """

    request_id: str
    route: Route
    prompt: Prompt
    sampling: SamplingParams
    stop: tuple[str, ...]
    divergence: DivergenceSpec
    evaluation: EvaluationSpec
    output: OutputSpec
    cache_salt: str = ""
    is_max_tokens_default: bool = False

    @property
    def basis(self) -> Basis:
        """The basis asked for, except that greedy requests have no tempered distribution."""
        return Basis.RAW if self.sampling.is_greedy else self.divergence.basis

    @property
    def logprob_temperature(self) -> float:
        return 1.0 if self.basis is Basis.RAW else self.sampling.temperature


@dataclass(frozen=True, slots=True)
class ScoreSpec:
    """A valid Score request; `roles` is empty when the client left the choice to the server."""

    request_id: str
    prompt: Prompt
    completions: tuple[str | tuple[int, ...], ...]
    roles: tuple[Role, ...]
    temperature: float
    divergence: DivergenceSpec
    cache_salt: str = ""
    returns_prompt_token_ids: bool = False
