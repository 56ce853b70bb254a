"""What each variant costs in quality on held-out text: exact KL, top-1 agreement, perplexity.

Every model runs in the engine that serves it and scores the teacher's own completions of the test
prompts, so the numbers are of the path that users get. KL is over the full vocabulary, in float64.

`eval/per_prompt.jsonl` has one row per held-out prompt, then one per task:

    kind "held_out"   prompt (0, 1 …), num_tokens, nll: model → nats per token,
                      forward_kl: reference → model → nats per token,
                      num_flips: reference → model → positions
    kind "task"       as `export.measure.task_scores.TaskEvaluation.rows()` says

`HeldOut.rows()` are the rows of the first kind; `export.measure.summary` has what goes beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from bundle.hashing import hash_json
from estimators.bootstrap import bootstrap_ratio
from estimators.estimate import Interval
from export.measure.summary import FlipMargins, ModelQuality, to_json
from export.run.errors import ExportError
from export.student.losses import exact_logprobs
from export.teacher.examples import Example
from serve.engine.engine import Engine
from serve.engine.offline import OfflineEngine
from serve.engine.scoring import ScoringRequest
from serve.models.backend import Backend
from serve.models.noise import MAX_PATH_NOISE_NATS, measure_noise_floor

# Float32 logits of all models for one batch of prompts; beyond it batches get smaller.
MAX_LOGITS_BYTES = 2**30
# Float64 log-probabilities of all models exist for so many positions of one prompt at a time.
MAX_POSITIONS = 64
# A quantile is reported where at least one value lies beyond it.
MIN_TOKENS_FOR_P99 = 100
MIN_FLIPS_FOR_P90 = 10

Pair = tuple[str, str]
"""(reference, model)"""
Array = NDArray[Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One held-out prompt, all its completions together: means over `num_tokens`, in nats."""

    prompt: int
    num_tokens: int
    nll: Mapping[str, float]
    forward_kl: Mapping[Pair, float]
    num_flips: Mapping[Pair, int]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """All that one pass over the held-out text measured.

    `perplexity` is exp of the mean negative log-likelihood of the completion tokens, per model.
    `prompts` follow the order in which their prompts first appear.
    """

    prompts_sha256: str
    num_tokens: int
    agreements: Mapping[Pair, ModelQuality]
    perplexity: Mapping[str, float]
    prompts: tuple[PromptRecord, ...]

    @property
    def quality(self) -> dict[str, dict[str, ModelQuality]]:
        """The agreements by reference and model."""
        return _nested(self.agreements)

    def rows(self) -> list[dict[str, Any]]:
        """Return this module's rows of `per_prompt.jsonl`."""
        return [
            to_json(
                {
                    "kind": "held_out",
                    "prompt": record.prompt,
                    "num_tokens": record.num_tokens,
                    "nll": record.nll,
                    "forward_kl": _nested(record.forward_kl),
                    "num_flips": _nested(record.num_flips),
                }
            )
            for record in self.prompts
        ]


def evaluate(
    backends: Mapping[str, Backend],
    references: Sequence[str],
    examples: Sequence[Example],
    progress: Callable[[int, int], None],
) -> HeldOut:
    """Hold every model against every other one named in `references`, in one pass over the text.

    Prompts go one batch at a time, and every model's softmax is taken once per prompt.

    Raises:
        ExportError: without examples.
    """
    if not examples:
        raise ExportError("no held-out text: the split 'test' has no completions; add prompts")
    engines = {name: _engine(name, backend) for name, backend in backends.items()}
    prompts = list(dict.fromkeys(example.prompt_token_ids for example in examples))
    indices = {prompt: index for index, prompt in enumerate(prompts)}
    scores = _TokenScores(references)
    done = 0
    for batch in _batches(examples, backends):
        logits = [_logits(engine, batch) for engine in engines.values()]
        for example, *of_one_example in zip(batch, *logits, strict=True):
            by_model = dict(zip(engines, of_one_example, strict=True))
            scores.add(indices[example.prompt_token_ids], example, by_model)
        done += len(batch)
        progress(done, len(examples))
    return scores.held_out(hash_json(prompts))


def _engine(name: str, backend: Backend) -> OfflineEngine:
    in_one_pass = measure_noise_floor(backend).path_nats <= MAX_PATH_NOISE_NATS
    engine = Engine(backend, eos_token_ids=frozenset(), name=name, scores_in_one_pass=in_one_pass)
    return OfflineEngine(engine)


def _logits(engine: OfflineEngine, batch: Sequence[Example]) -> list[torch.Tensor]:
    """Return the raw logits `(T, V)` of each example's completion positions."""
    requests = [
        ScoringRequest(
            request_id=str(index),
            prompt_token_ids=example.prompt_token_ids,
            completions=(example.completion_token_ids,),
            with_logits=True,
        )
        for index, example in enumerate(batch)
    ]
    logits = []
    for (scored,) in engine.score(requests):
        assert scored.logits is not None, "asked for with_logits"
        logits.append(torch.from_numpy(scored.logits))
    return logits


def _batches(
    examples: Sequence[Example], backends: Mapping[str, Backend]
) -> Iterator[list[Example]]:
    """Yield examples in order: as many as the models have rows, within `MAX_LOGITS_BYTES`."""
    max_num_seqs = min(backend.info.max_num_seqs for backend in backends.values())
    position_bytes = sum(4 * backend.info.vocab_size for backend in backends.values())
    batch: list[Example] = []
    num_positions = 0
    for example in examples:
        num_positions += len(example.completion_token_ids)
        if batch and (
            len(batch) == max_num_seqs or num_positions * position_bytes > MAX_LOGITS_BYTES
        ):
            yield batch
            batch, num_positions = [], len(example.completion_token_ids)
        batch.append(example)
    yield batch


@dataclass(slots=True)
class _TokenScores:
    """What is kept of every completion position: a few numbers per model and per pair."""

    references: Sequence[str]
    prompts: list[int] = field(default_factory=list)
    nll: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    argmax: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    margins: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    forward_kl: dict[Pair, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, prompt: int, example: Example, logits: Mapping[str, torch.Tensor]) -> None:
        """Measure one example from every model's raw logits `(T, V)`."""
        token_ids = torch.tensor(example.completion_token_ids)
        self.prompts += [prompt] * len(token_ids)
        for start in range(0, len(token_ids), MAX_POSITIONS):
            here = slice(start, start + MAX_POSITIONS)
            self._add_slice(token_ids[here], {name: x[here] for name, x in logits.items()})

    def _add_slice(self, token_ids: torch.Tensor, logits: Mapping[str, torch.Tensor]) -> None:
        logprobs = {name: exact_logprobs(x) for name, x in logits.items()}
        for name, x in logprobs.items():
            of_tokens = x.gather(-1, token_ids[:, None])[:, 0]
            self.nll.setdefault(name, []).append(-of_tokens)
            self.argmax.setdefault(name, []).append(logits[name].argmax(-1))
        for reference in self.references:
            first, second = logits[reference].topk(2).values.unbind(-1)
            self.margins.setdefault(reference, []).append(first - second)
            for name, kl in _forward_kls(reference, logprobs):
                self.forward_kl.setdefault((reference, name), []).append(kl)

    def held_out(self, prompts_sha256: str) -> HeldOut:
        prompts = np.array(self.prompts)
        nll = _joined(self.nll)
        forward_kl = _joined(self.forward_kl)
        argmax = _joined(self.argmax)
        margins = _joined(self.margins)
        flips = {(r, m): argmax[r] != argmax[m] for r, m in forward_kl}
        return HeldOut(
            prompts_sha256=prompts_sha256,
            num_tokens=len(prompts),
            agreements={
                pair: _quality(prompts, kl, flips[pair], margins[pair[0]])
                for pair, kl in forward_kl.items()
            },
            perplexity={name: _perplexity(values) for name, values in nll.items()},
            prompts=_prompt_records(prompts, nll, forward_kl, flips),
        )


def _forward_kls(
    reference: str, logprobs: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every other model's name and KL(reference ‖ model) per position, `(T,)`.

    Σ p (log p − log q) with p taken once for all models. The logarithms are subtracted before the
    sum: two sums would lose the digits of a KL of 1e-9.
    """
    expected = logprobs[reference]
    probabilities = expected.exp()
    for name, actual in logprobs.items():
        if name != reference:
            yield name, torch.einsum("tv,tv->t", probabilities, expected - actual)


def _quality(prompts: Array, forward_kl: Array, flips: Array, margins: Array) -> ModelQuality:
    num_tokens, num_flips = len(flips), int(flips.sum())
    is_number = bool(np.isfinite(forward_kl).all())
    has_p99 = is_number and num_tokens >= MIN_TOKENS_FOR_P99
    return ModelQuality(
        forward_kl=float(forward_kl.mean()),
        forward_kl_ci=_interval(prompts, forward_kl) if is_number else None,
        forward_kl_p99=float(np.quantile(forward_kl, 0.99)) if has_p99 else None,
        argmax_agreement=1 - num_flips / num_tokens,
        num_tokens=num_tokens,
        num_flips=num_flips,
        flip_margins=_flip_margins(margins[flips]) if num_flips else None,
    )


def _interval(prompts: Array, forward_kl: Array) -> Interval | None:
    return bootstrap_ratio(np.bincount(prompts, forward_kl), np.bincount(prompts)).interval


def _flip_margins(margins: Array) -> FlipMargins:
    has_p90 = len(margins) >= MIN_FLIPS_FOR_P90
    return FlipMargins(
        median=float(np.median(margins)),
        p90=float(np.quantile(margins, 0.9)) if has_p90 else None,
        max=float(margins.max()),
    )


def _perplexity(nll: Array) -> float:
    with np.errstate(over="ignore"):  # infinity says it
        return float(np.exp(nll.mean()))


def _prompt_records(
    prompts: Array,
    nll: Mapping[str, Array],
    forward_kl: Mapping[Pair, Array],
    flips: Mapping[Pair, Array],
) -> tuple[PromptRecord, ...]:
    num_tokens = np.bincount(prompts)
    mean_nll = {name: np.bincount(prompts, x) / num_tokens for name, x in nll.items()}
    mean_kl = {pair: np.bincount(prompts, x) / num_tokens for pair, x in forward_kl.items()}
    num_flips = {pair: np.bincount(prompts, x) for pair, x in flips.items()}
    return tuple(
        PromptRecord(
            prompt=i,
            num_tokens=int(num_tokens[i]),
            nll={name: float(x[i]) for name, x in mean_nll.items()},
            forward_kl={pair: float(x[i]) for pair, x in mean_kl.items()},
            num_flips={pair: int(x[i]) for pair, x in num_flips.items()},
        )
        for i in range(len(num_tokens))
    )


def _joined(pieces: Mapping[Any, Sequence[torch.Tensor]]) -> dict[Any, Array]:
    return {key: torch.cat(list(tensors)).numpy() for key, tensors in pieces.items()}


def _nested(by_pair: Mapping[Pair, T]) -> dict[str, dict[str, T]]:
    nested: dict[str, dict[str, T]] = {}
    for (reference, model), value in by_pair.items():
        nested.setdefault(reference, {})[model] = value
    return nested
