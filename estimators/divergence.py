"""Divergences between two next-token distributions, in nats.

Two kinds. *Sampled* (`k1`, `k2`, `k3`, `summarize`): from the log-probabilities both models gave
to the tokens that were sampled, one number per token. They estimate KL(policy‖reference) only when
the tokens were sampled from the policy itself, untruncated; the caller says which model that is and
on which basis (temperature) both log-probabilities were taken. *Exact* (`exact_kl`,
`predicted_acceptance`, ...): from both models' full logits, one number per position.

Nothing reported here is clamped. A token that has no finite estimate is counted, not rounded.

An exact function holds about eight float64 arrays of its logits' size while it runs (0.4 MB each
per position at a vocabulary of 49,152): hand it long sequences in slices.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

LARGE_LOG_RATIO = 5.0
"""|log reference − log policy| in nats above which a token is counted as `large_ratio_tokens`."""


@dataclass(frozen=True)
class DivergenceSummary:
    """What the k1, k2 and k3 estimates of a set of tokens add up to, in nats.

    Sums, means, `max_abs_log_ratio` and `large_ratio_tokens` are over the finite tokens alone, of
    which there are `num_tokens - nonfinite_tokens`. With none, sums are 0.0, being empty, and what
    an empty set does not have is None.
    """

    k1_sum: float
    k2_sum: float
    k3_sum: float
    k1_mean: float | None
    k2_mean: float | None
    k3_mean: float | None
    num_tokens: int
    max_abs_log_ratio: float | None
    large_ratio_tokens: int
    nonfinite_tokens: int

    @property
    def num_finite_tokens(self) -> int:
        """Number of tokens the sums run over, by which they can be added to other summaries."""
        return self.num_tokens - self.nonfinite_tokens


def k1(policy_logprobs: ArrayLike, reference_logprobs: ArrayLike) -> FloatArray:
    """Return log π − log π_ref per token: unbiased for KL(policy‖reference), negative at times.

    Args:
        policy_logprobs: any shape, log-probabilities in nats of the sampled tokens under the model
            that sampled them.
        reference_logprobs: the same shape, the same tokens under the other model.

    Raises:
        ValueError: if the shapes differ, if a value is NaN or +inf, or if both probabilities of a
            token are 0. One probability of 0 gives an infinite estimate.

    Source: Schulman, "Approximating KL Divergence" (2020), estimator k1.

    >>> k1([-1.0, -2.0], [-1.5, -1.0]).tolist()
    [0.5, -1.0]
    """
    policy, reference = _checked_logprobs(policy_logprobs, reference_logprobs)
    return policy - reference


def k2(policy_logprobs: ArrayLike, reference_logprobs: ArrayLike) -> FloatArray:
    """Return ½ (log π_ref − log π)² per token: low variance, never negative, biased.

    Arguments and errors are those of `k1`. Source: Schulman (2020), estimator k2.

    >>> k2([-1.0, -2.0], [-1.5, -1.0]).tolist()
    [0.125, 0.5]
    """
    with np.errstate(over="ignore"):
        return 0.5 * np.square(k1(policy_logprobs, reference_logprobs))


def k3(policy_logprobs: ArrayLike, reference_logprobs: ArrayLike) -> FloatArray:
    """Return r − ln r − 1 with r = π_ref/π per token: unbiased for KL(policy‖reference), ≥ 0.

    A token's estimate, not a sequence's: sum it over tokens, and never give it the product of the
    ratios of a sequence. Arguments and errors are those of `k1`; a ratio too large for a float64
    (ln r > 709) gives inf.

    Source: Schulman (2020), estimator k3; Shao et al., "DeepSeekMath" (2024), eq. 4 (GRPO).

    >>> k3([-1.0, -2.0], [-1.5, -1.0]).round(6).tolist()
    [0.106531, 0.718282]
    >>> k3([-1.0, -2.0], [-1.5])
    Traceback (most recent call last):
        ...
    ValueError: policy_logprobs has shape (2,) and reference_logprobs (1,); they must be equal
    """
    return _k3_of_log_ratio(-k1(policy_logprobs, reference_logprobs))


def summarize(policy_logprobs: ArrayLike, reference_logprobs: ArrayLike) -> DivergenceSummary:
    """Add up k1, k2 and k3 over the tokens given, all of them: pass no prompt, no padding.

    A token is nonfinite, so counted and left out of everything else, when either probability is 0
    (a log-probability of −inf) or when one of its estimates is too large for a float64.

    Raises:
        ValueError: if the shapes differ or a value is NaN or +inf, which no probability has.

    >>> summary = summarize([-1.0, -2.0, -0.5], [-1.5, -1.0, float("-inf")])
    >>> summary.num_tokens, summary.nonfinite_tokens, summary.k1_mean, summary.max_abs_log_ratio
    (3, 1, -0.25, 1.0)
    """
    policy, reference = _checked_pair(
        "policy_logprobs", policy_logprobs, "reference_logprobs", reference_logprobs
    )
    has_mass = np.isfinite(policy) & np.isfinite(reference)
    given = policy[has_mass], reference[has_mass]
    estimates = np.stack([k1(*given), k2(*given), k3(*given)])
    estimates = estimates[:, np.isfinite(estimates).all(axis=0)]
    with np.errstate(over="ignore"):
        k1_sum, k2_sum, k3_sum = estimates.sum(axis=1).tolist()
    num_finite = estimates.shape[1]
    abs_log_ratios = np.abs(estimates[0])
    return DivergenceSummary(
        k1_sum=k1_sum,
        k2_sum=k2_sum,
        k3_sum=k3_sum,
        k1_mean=k1_sum / num_finite if num_finite else None,
        k2_mean=k2_sum / num_finite if num_finite else None,
        k3_mean=k3_sum / num_finite if num_finite else None,
        num_tokens=policy.size,
        max_abs_log_ratio=float(abs_log_ratios.max()) if num_finite else None,
        large_ratio_tokens=int((abs_log_ratios > LARGE_LOG_RATIO).sum()),
        nonfinite_tokens=policy.size - num_finite,
    )


def exact_kl(policy_logits: ArrayLike, reference_logits: ArrayLike) -> FloatArray:
    """Return KL(policy‖reference) = Σ p ln(p/q) per position over the full vocabulary.

    Summed as Σ (p ln(p/q) − p + q), which is the same as p and q each sum to 1, but whose terms
    are all ≥ 0: the result is never negative, exactly 0 for equal logits, and keeps its digits for
    models that hardly differ. It is inf where the reference masks an entry that the policy does
    not; 0 ln 0 is 0.

    Args:
        policy_logits, reference_logits: (..., V) each, unnormalised, any float dtype (computed in
            float64), on one temperature. Nothing is broadcast.

    Returns:
        (...), nats.

    Raises:
        ValueError: if the shapes differ (vocabularies of two sizes included: compare the real
            tokens only), if there is no vocabulary axis, if a logit is NaN or +inf, or if all the
            logits of a position are −inf, which masks an entry.

    Source: Kullback and Leibler, "On Information and Sufficiency" (1951), section 2.

    >>> import numpy as np
    >>> p, q = np.log([0.7, 0.2, 0.1]), np.log([0.2, 0.3, 0.5])
    >>> float(exact_kl(p, q).round(6)), float(exact_kl(q, p).round(6))
    (0.634897, 0.675806)
    >>> exact_kl(p, q[:2])
    Traceback (most recent call last):
        ...
    ValueError: policy_logits has shape (3,) and reference_logits (2,); they must be equal
    """
    return _kl(*_policy_and_reference(policy_logits, reference_logits))


def argmax_agreement(policy_logits: ArrayLike, reference_logits: ArrayLike) -> NDArray[np.bool_]:
    """Return whether both models' most probable token is the same, per position.

    Equal logits are broken as greedy decoding breaks them, by the lowest token id. Shapes (..., V)
    to (...) and errors are those of `exact_kl`.

    >>> argmax_agreement([[2.0, 1.0], [0.0, 1.0]], [[5.0, 0.0], [1.0, 0.0]]).tolist()
    [True, False]
    """
    policy, reference = _policy_and_reference(policy_logits, reference_logits)
    return np.asarray(policy.argmax(axis=-1) == reference.argmax(axis=-1))


def predicted_acceptance(policy_logits: ArrayLike, reference_logits: ArrayLike) -> FloatArray:
    """Return Σ min(p, q) = 1 − TV(p, q) per position, symmetric, a probability.

    It is the chance that speculative decoding accepts a token drafted by the one model and checked
    by the other. Shapes (..., V) to (...) and errors are those of `exact_kl`.

    Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023),
    corollary 3.6.

    >>> import numpy as np
    >>> float(predicted_acceptance(np.log([0.7, 0.2, 0.1]), np.log([0.2, 0.3, 0.5])).round(12))
    0.5
    """
    policy, reference = _policy_and_reference(policy_logits, reference_logits)
    acceptance: FloatArray = np.exp(np.minimum(policy, reference)).sum(axis=-1)
    return acceptance


def _k3_of_log_ratio(log_ratio: FloatArray) -> FloatArray:
    """Return e^x − 1 − x, with the digits that `exp(x) - 1 - x` loses near 0; inf at both ends."""
    with np.errstate(over="ignore", invalid="ignore"):
        excess = np.expm1(log_ratio)
        return np.where(np.isinf(excess), np.inf, excess - log_ratio)


def _kl(p_logprobs: FloatArray, q_logprobs: FloatArray) -> FloatArray:
    """Return Σ (p ln(p/q) − p + q) over the last axis for normalised log-probabilities."""
    p_has_mass, q_has_mass = p_logprobs > -np.inf, q_logprobs > -np.inf
    p, q = np.exp(p_logprobs), np.exp(q_logprobs)
    log_ratio = np.zeros_like(p)
    np.subtract(q_logprobs, p_logprobs, out=log_ratio, where=p_has_mass & q_has_mass)
    terms = q - p - p * log_ratio
    # Near a ratio of 1 those three cancel; far from it, k3 would overflow where p underflows.
    near = p_has_mass & (np.abs(log_ratio) < 1.0)
    terms[near] = p[near] * _k3_of_log_ratio(log_ratio[near])
    kl: FloatArray = np.where((p_has_mass & ~q_has_mass).any(axis=-1), np.inf, terms.sum(axis=-1))
    return kl


def _normalised(name: str, logits: FloatArray) -> FloatArray:
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} has shape {logits.shape}; its last axis must be the vocabulary")
    largest = logits.max(axis=-1, keepdims=True)
    num_masked = int(np.isneginf(largest).sum())
    if num_masked:
        raise ValueError(
            f"{name} masks every entry at {num_masked} of {largest.size} positions,"
            " which leaves nothing to normalise"
        )
    shifted = logits - largest
    logprobs: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logprobs


def _policy_and_reference(
    policy_logits: ArrayLike, reference_logits: ArrayLike
) -> tuple[FloatArray, FloatArray]:
    policy, reference = _checked_pair(
        "policy_logits", policy_logits, "reference_logits", reference_logits
    )
    return _normalised("policy_logits", policy), _normalised("reference_logits", reference)


def _checked_logprobs(policy: ArrayLike, reference: ArrayLike) -> tuple[FloatArray, FloatArray]:
    checked = _checked_pair("policy_logprobs", policy, "reference_logprobs", reference)
    num_undefined = int((np.isneginf(checked[0]) & np.isneginf(checked[1])).sum())
    if num_undefined:
        raise ValueError(
            f"both probabilities are 0 at {num_undefined} of {checked[0].size} tokens, where their"
            " ratio is undefined; leave those tokens out"
        )
    return checked


def _checked_pair(
    policy_name: str, policy: ArrayLike, reference_name: str, reference: ArrayLike
) -> tuple[FloatArray, FloatArray]:
    pair = _checked(policy_name, policy), _checked(reference_name, reference)
    if pair[0].shape != pair[1].shape:
        raise ValueError(
            f"{policy_name} has shape {pair[0].shape} and {reference_name} {pair[1].shape};"
            " they must be equal"
        )
    return pair


def _checked(name: str, values: ArrayLike) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    num_invalid = int((np.isnan(array) | np.isposinf(array)).sum())
    if num_invalid:
        raise ValueError(
            f"{name} holds NaN or +inf at {num_invalid} of {array.size} entries;"
            " finite values and -inf are allowed"
        )
    return array
