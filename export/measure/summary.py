"""`eval/summary.json`: what a run measured, in types. The names of models and numbers stand here.

    prompts_sha256, num_prompts, num_tokens   of the held-out text; a hash of the prompts' token ids
    quality      reference → model → `ModelQuality`
    perplexity   model → perplexity of the held-out text
    tasks        `TaskSummary`; absent without tasks whose answer can be checked
    speed        contender → `Speed`
    memory       variant → peak bytes (`export.measure.memory`)

The file is strict JSON: what came out as NaN or infinity is null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from bundle.errors import one_line
from estimators.estimate import Estimate, Interval
from export.run.errors import ExportError
from export.run.files import write_json
from export.teacher.grading import SecondOpinion

SUMMARY_NAME = "summary.json"
TEACHER, STUDENT = "teacher", "student"
TRANSFORMERS, TORCH = "teacher_transformers", "teacher_torch"
SPEED_METRIC, KL_METRIC = "decode_tokens_per_s", "kl_to_teacher"


def _read_estimate(raw: Any) -> Any:
    if not isinstance(raw, dict):
        return raw
    return {"value": raw.get("value"), **(raw.get("interval") or {})}


WrittenEstimate = Annotated[Estimate, BeforeValidator(_read_estimate)]
"""In the file: `{"value": 0.5, "interval": {"low": 0.25, "high": 0.75}}`, the interval or null."""


@dataclass(frozen=True, slots=True)
class FlipMargins:
    """How sure the reference was where the model prefers another token: its largest logit minus
    its second largest, over the flips. `p90` is None for fewer than 10 flips."""

    median: float
    p90: float | None
    max: float


@dataclass(frozen=True, slots=True)
class ModelQuality:
    """A model against a reference, over completion tokens: `forward_kl` is KL(reference ‖ model)
    in nats per token; `argmax_agreement` the top-1 agreement, a share of positions.

    `forward_kl` is None where it was not finite. `forward_kl_ci` is at 95 %, over prompts; None
    where `estimators.bootstrap` has none and for a KL that is not a number. `forward_kl_p99` is the
    quantile over tokens, None below 100 tokens.
    """

    forward_kl: float | None
    forward_kl_ci: Interval | None
    forward_kl_p99: float | None
    argmax_agreement: float
    num_tokens: int
    num_flips: int
    flip_margins: FlipMargins | None


@dataclass(frozen=True, slots=True)
class PassRates:
    """One model over some tasks: means over prompts, with 95 % intervals over prompts."""

    num_prompts: int
    pass_at_k: Mapping[int, WrittenEstimate]
    majority_at_n: WrittenEstimate


@dataclass(frozen=True, slots=True)
class SolvedTasks:
    """What one model solves, over all tasks and by family; `num_failed` completions are no text."""

    overall: PassRates
    families: Mapping[str, PassRates]
    num_failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSummary:
    """What every model solves; `tasks_sha256` is of the task ids.

    Bundles from before there was a second opinion have none.
    """

    tasks_sha256: str
    num_samples: int
    temperature: float
    max_tokens: int
    seed: int
    second_opinion: SecondOpinion | None = None
    models: Mapping[str, SolvedTasks]


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over the rounds: `prefill_s` of the prompt, `decode_tokens_per_s` behind it."""

    prefill_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSummary:
    """All that a run measured, in the file's order; see this module."""

    prompts_sha256: str
    num_prompts: int
    num_tokens: int
    quality: Mapping[str, Mapping[str, ModelQuality]]
    perplexity: Mapping[str, float | None]
    tasks: TaskSummary | None = None
    speed: Mapping[str, Speed]
    memory: Mapping[str, int]

    def quality_of(self, reference: str, model: str) -> ModelQuality | None:
        """Return a model against a reference, None where it was not measured."""
        return self.quality.get(reference, {}).get(model)


_SUMMARY = TypeAdapter(EvalSummary)


def write_summary(folder: Path, summary: EvalSummary) -> None:
    """Write `summary.json` into `folder`."""
    values = to_json(summary)
    if summary.tasks is None:
        del values["tasks"]
    elif summary.tasks.second_opinion is None:
        del values["tasks"]["second_opinion"]
    write_json(folder / SUMMARY_NAME, values)


def read_summary(folder: Path) -> EvalSummary:
    """Read `summary.json` of a folder; ExportError names what is missing or wrong in it."""
    path = folder / SUMMARY_NAME
    try:
        return _SUMMARY.validate_python(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ExportError(f"{path} does not exist: export the bundle again") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ExportError(
            one_line(f"{path}: {place}: {first['msg']}: export the bundle again")
        ) from None
    except ValueError as error:
        raise ExportError(f"{path} is not JSON: {error}") from None


def to_json(value: Any) -> Any:
    """Return a JSON value, with null for every number that JSON cannot spell."""
    if isinstance(value, Estimate):
        return {"value": to_json(value.value), "interval": to_json(value.interval)}
    if is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
