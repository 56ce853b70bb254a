"""How right an arm's answers were, and how far its tokens are from the other model's.

The samples of a request are one try at its prompt: pass@k and the majority are taken per request,
then averaged over requests. Intervals resample prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

from estimators.bootstrap import Resampling
from estimators.consensus import Vote, agreement, majority_vote, vote_correctness
from estimators.estimate import Estimate
from estimators.pass_at_k import pass_at_k
from loadtest.analysis.percentiles import log_histogram
from loadtest.analysis.statistics import (
    clustered_difference,
    clustered_ratio,
    clustered_share,
    mcnemar_p,
)
from loadtest.analysis.summary import Quality
from loadtest.records import RequestRecord, SampleRecord

Pair = tuple[RequestRecord, RequestRecord]

_LEAST_K3 = 1e-6
# Hundreds of positions, each a point of one curve: BCa's order of resamples is not worth its time.
_BY_POSITION = Resampling(num_resamples=500, method="percentile")


def quality(records: Sequence[RequestRecord], ks: Sequence[int]) -> Quality | None:
    """Return the quality of an arm's OK requests; None when nothing is known of any."""
    judged = [record for record in records if is_judged(record)]
    samples = list(chain.from_iterable(record.samples for record in records))
    if not judged and all(sample.num_kl_tokens is None for sample in samples):
        return None
    per_token = [k3 for sample in samples for k3 in sample.per_token_k3 if math.isfinite(k3)]
    return Quality(
        pass_at_k={k: each for k in ks if (each := _pass_at_k(judged, k)) is not None},
        majority_correct=_share(judged, majority_correct),
        k3=_mean_kl(records, lambda sample: sample.k3_sum),
        exact_kl=_mean_kl(records, _exact_kl_sum),
        k3_histogram=log_histogram(per_token, _LEAST_K3),
        k3_by_position=_k3_by_position(records),
    )


def differences(pairs: Sequence[Pair], ks: Sequence[int]) -> dict[str, Estimate]:
    """Return a − b of each pass@k and of the majority, over the pairs that both have judged."""
    judged = [(a, b) for a, b in pairs if is_judged(a) and is_judged(b)]
    found: dict[str, Estimate] = {}
    for k in ks:
        enough = [(a, b) for a, b in judged if min(len(a.samples), len(b.samples)) >= k]
        if enough:
            found[f"pass@{k}"] = _difference(enough, partial(request_pass_at_k, k=k))
    if judged:
        found["majority"] = _difference(judged, majority_correct)
    return found


def agreement_share(pairs: Sequence[Pair]) -> Estimate | None:
    """Return the share of pairs with the same majority answer, of those where both have one."""
    compared = [
        (a.plan.prompt_id, float(same))
        for a, b in pairs
        if (same := agreement(_vote(a), _vote(b))) is not None
    ]
    if not compared:
        return None
    return clustered_share([same for _, same in compared], [prompt for prompt, _ in compared])


def correctness_p(pairs: Sequence[Pair]) -> float | None:
    """Return McNemar's p of the majorities' correctness; None without a judged pair.

    One pair per prompt, its first: the test takes pairs to be independent. A tie is right when all
    its answers are.
    """
    firsts: dict[str, Pair] = {}
    for a, b in pairs:
        if is_judged(a) and is_judged(b):
            firsts.setdefault(a.plan.prompt_id, (a, b))
    if not firsts:
        return None
    outcomes = [(majority_correct(a) == 1, majority_correct(b) == 1) for a, b in firsts.values()]
    return mcnemar_p(outcomes.count((True, False)), outcomes.count((False, True)))


def is_judged(record: RequestRecord) -> bool:
    return any(sample.is_correct is not None for sample in record.samples)


def request_pass_at_k(record: RequestRecord, k: int) -> float:
    """Return a request's pass@k. A sample that is not judged did not end well: it is wrong."""
    num_correct = sum(sample.is_correct is True for sample in record.samples)
    return float(pass_at_k(len(record.samples), num_correct, k))


def majority_correct(record: RequestRecord) -> float:
    """Return whether the majority is right, for a tie the share of its answers that are.

    Samples that all abstain have no majority and score 0.
    """
    right = {sample.answer for sample in record.samples if sample.is_correct}
    return vote_correctness(_vote(record), right.__contains__) or 0.0


def _vote(record: RequestRecord) -> Vote:
    return majority_vote(sample.answer for sample in record.samples)


def _prompts(records: Sequence[RequestRecord]) -> list[str]:
    return [record.plan.prompt_id for record in records]


def _share(
    records: Sequence[RequestRecord], score: Callable[[RequestRecord], float]
) -> Estimate | None:
    if not records:
        return None
    return clustered_share([score(record) for record in records], _prompts(records))


def _pass_at_k(records: Sequence[RequestRecord], k: int) -> Estimate | None:
    enough = [record for record in records if len(record.samples) >= k]
    return _share(enough, partial(request_pass_at_k, k=k))


def _difference(pairs: Sequence[Pair], score: Callable[[RequestRecord], float]) -> Estimate:
    firsts = [a for a, _ in pairs]
    return clustered_difference(
        [score(a) for a in firsts], [score(b) for _, b in pairs], _prompts(firsts)
    )


def _exact_kl_sum(sample: SampleRecord) -> float | None:
    if sample.exact_kl_mean is None or sample.num_kl_tokens is None:
        return None
    return sample.exact_kl_mean * sample.num_kl_tokens


def _mean_kl(
    records: Sequence[RequestRecord], kl_sum: Callable[[SampleRecord], float | None]
) -> Estimate | None:
    """Return nats per token: all samples' sums over all their tokens."""
    known = [
        (record.plan.prompt_id, total, sample.num_kl_tokens)
        for record in records
        for sample in record.samples
        if sample.num_kl_tokens and (total := kl_sum(sample)) is not None
    ]
    if not known:
        return None
    prompts, totals, num_tokens = zip(*known, strict=True)
    return clustered_ratio(totals, num_tokens, prompts)


def _k3_by_position(records: Sequence[RequestRecord]) -> tuple[Estimate, ...]:
    """Return the mean at each position, up to the first one that no sample knows."""
    samples = [
        (record.plan.prompt_id, sample.per_token_k3)
        for record in records
        for sample in record.samples
    ]
    means: list[Estimate] = []
    for position in range(max((len(k3s) for _, k3s in samples), default=0)):
        at = [(p, k3s[position]) for p, k3s in samples if len(k3s) > position]
        finite = [(prompt, k3) for prompt, k3 in at if math.isfinite(k3)]
        if not finite:
            break
        prompts, k3s = zip(*finite, strict=True)
        means.append(clustered_ratio(k3s, [1.0] * len(k3s), prompts, _BY_POSITION))
    return tuple(means)
