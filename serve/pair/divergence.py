"""How far two models are apart on completions that one of them wrote.

The other model scores the completions in one teacher-forced pass; `estimators.divergence` does the
arithmetic. Nothing here knows about gRPC.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from estimators import divergence as estimators
from estimators.divergence import DivergenceSummary
from serve.engine.scoring import ScoredCompletion, ScoringRequest
from serve.errors import TandemError
from serve.pair.served import Role, ServedModel
from serve.pair.tasks import running

FloatArray = NDArray[np.float64]

# The exact estimators hold eight float64 copies of their logits: 50 MB at a vocabulary of 49,152.
_EXACT_SLICE = 16


class ReferenceFailedError(TandemError):
    """The reference model returned log-probabilities that are none."""


@dataclass(frozen=True, slots=True)
class ExactDivergence:
    """Means over a completion's positions, from both models' full logits."""

    kl_mean: float
    argmax_agreement: float
    predicted_acceptance: float


@dataclass(frozen=True, slots=True)
class SampleDivergence:
    """Both models on one completion of T tokens; log-probabilities are `(T,)`, in nats."""

    policy: Role
    reference: Role
    summary: DivergenceSummary
    policy_logprobs: FloatArray
    reference_logprobs: FloatArray
    exact: ExactDivergence | None = None

    @property
    def per_token_k3(self) -> FloatArray:
        """k3 of each token, `(T,)`; NaN where both probabilities are 0, so that it is undefined."""
        is_defined = np.isfinite(self.policy_logprobs) | np.isfinite(self.reference_logprobs)
        k3 = np.full(len(self.policy_logprobs), np.nan)
        k3[is_defined] = estimators.k3(
            self.policy_logprobs[is_defined], self.reference_logprobs[is_defined]
        )
        return k3


@dataclass(frozen=True, slots=True)
class CompletionScore:
    """Completion `index` of a Score request under one model: see `ScoredCompletion`."""

    role: Role
    index: int
    token_ids: tuple[int, ...]
    logprobs: FloatArray
    is_greedy: NDArray[np.bool_] | None = None
    divergence: SampleDivergence | None = None


async def score(model: ServedModel, request: ScoringRequest) -> list[ScoredCompletion]:
    """Score completions. Cancelling the caller takes the request out of the engine's queue."""
    # The engine must be the one to cancel its future, so the future is shielded from us.
    scored = asyncio.wrap_future(model.engine.score(request))
    try:
        return await asyncio.shield(scored)
    except asyncio.CancelledError:
        # Nobody waits for how it ends now, which asyncio would otherwise complain of.
        scored.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        model.engine.cancel(request.request_id)
        raise


def compare(
    policy: Role, policy_logprobs: FloatArray, reference: Role, reference_logprobs: FloatArray
) -> SampleDivergence:
    """Summarize one completion.

    Raises:
        ReferenceFailedError: a log-probability is NaN or +inf, so a model's logits were not finite.
    """
    if not (policy_logprobs < np.inf).all() or not (reference_logprobs < np.inf).all():
        raise ReferenceFailedError(f"the {reference.value} returned non-finite logits")
    summary = estimators.summarize(policy_logprobs, reference_logprobs)
    return SampleDivergence(policy, reference, summary, policy_logprobs, reference_logprobs)


async def compare_exactly(
    policy: ServedModel, reference: ServedModel, request: ScoringRequest
) -> ExactDivergence:
    """Compare full distributions on the one completion of `request`, at its temperature."""
    assert len(request.completions) == 1, "sample by sample, to bound memory"
    request = replace(request, with_logits=True)
    async with running(score(policy, request), score(reference, request)) as tasks:
        scored = await asyncio.gather(*tasks)
    policy_logits, reference_logits = (completions[0].logits for completions in scored)
    assert policy_logits is not None and reference_logits is not None
    return await asyncio.to_thread(
        _summarize_exactly, policy_logits, reference_logits, request.temperature
    )


def _summarize_exactly(
    policy_logits: NDArray[np.float32], reference_logits: NDArray[np.float32], temperature: float
) -> ExactDivergence:
    """Average over positions and the tokens that both models have rows for."""
    num_tokens = len(policy_logits)
    vocab_size = min(policy_logits.shape[1], reference_logits.shape[1])
    sums = np.zeros(3)
    for start in range(0, num_tokens, _EXACT_SLICE):
        policy, reference = (
            logits[start : start + _EXACT_SLICE, :vocab_size] / temperature
            for logits in (policy_logits, reference_logits)
        )
        sums += [
            estimators.exact_kl(policy, reference).sum(),
            estimators.argmax_agreement(policy, reference).sum(),
            estimators.predicted_acceptance(policy, reference).sum(),
        ]
    return ExactDivergence(*(sums / num_tokens).tolist())


async def score_with_models(
    requests: Sequence[tuple[ServedModel, ScoringRequest]],
    *,
    wants_divergence: bool,
    wants_exact: bool,
) -> list[CompletionScore]:
    """Score the same completions with each model; by model, then by completion.

    With divergences (of two models) each model is the policy of its own scores.
    """
    async with running(*(score(model, request) for model, request in requests)) as tasks:
        by_model = await asyncio.gather(*tasks)
    scores = [
        CompletionScore(model.role, index, token_ids, scored.logprobs, scored.is_greedy)
        for (model, request), of_model in zip(requests, by_model, strict=True)
        for index, (token_ids, scored) in enumerate(zip(request.completions, of_model, strict=True))
    ]
    if not wants_divergence:
        return scores
    half = len(scores) // 2
    (first, request), (second, _) = requests
    compared = []
    for mine, theirs in zip(scores, scores[half:] + scores[:half], strict=True):
        divergence = compare(mine.role, mine.logprobs, theirs.role, theirs.logprobs)
        if wants_exact:
            policy, reference = (first, second) if mine.role is first.role else (second, first)
            one = replace(request, completions=(mine.token_ids,))
            exact = await compare_exactly(policy, reference, one)
            divergence = replace(divergence, exact=exact)
        compared.append(replace(mine, divergence=divergence))
    return compared
