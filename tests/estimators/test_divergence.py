import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax

from estimators.divergence import (
    argmax_agreement,
    exact_kl,
    k1,
    k2,
    k3,
    predicted_acceptance,
    summarize,
)

INF = float("inf")
P, Q = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.3, 0.5])
LOG_P, LOG_Q = np.log(P), np.log(Q)
KL_PQ, KL_QP = 0.6348972651, 0.6758058950

# Whole numbers among them, so that equal logits and far ones both come up.
logit = st.integers(-40, 40).map(float) | st.floats(-40, 40)


@st.composite
def logits_pairs(draw):
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=4))
    pair = st.tuples(*[hnp.arrays(np.float64, shape, elements=logit)] * 2)
    return draw(pair)


# Sampled: k1, k2, k3


def test_k3_per_outcome_is_r_minus_ln_r_minus_1():
    np.testing.assert_allclose(
        k3(LOG_P, LOG_Q), [0.5384772542, 0.0945348919, 2.3905620876], atol=5e-11
    )


def test_k1_and_k3_average_to_kl_under_the_policy():
    assert P @ k1(LOG_P, LOG_Q) == pytest.approx(KL_PQ, abs=5e-11)
    assert P @ k3(LOG_P, LOG_Q) == pytest.approx(P @ k1(LOG_P, LOG_Q), abs=1e-12)


def test_k2_is_biased():
    assert P @ k2(LOG_P, LOG_Q) == pytest.approx(0.6952499844, abs=5e-11)


def test_k3_with_the_ratio_inverted_is_neither_kl():
    inverted = P @ k3(LOG_Q, LOG_P)
    assert inverted == pytest.approx(0.9684360682, abs=1e-10)
    assert abs(inverted - KL_PQ) > 0.2 and abs(inverted - KL_QP) > 0.2


def test_k3_keeps_its_digits_next_to_a_ratio_of_1():
    assert k3(0.0, 1e-9) == pytest.approx(5e-19, rel=1e-6)
    assert k3(0.0, -1e-9) == pytest.approx(5e-19, rel=1e-6)


@given(hnp.arrays(np.float64, 8, elements=st.floats(-800, 800)), st.integers(0, 320))
def test_k3_is_never_negative(log_ratios, exponent):
    assert (k3(np.zeros(8), log_ratios * 10.0**-exponent) >= 0).all()


@given(logits_pairs())
def test_k3_averages_to_exact_kl_on_a_finite_outcome_set(pair):
    policy, reference = (log_softmax(logits, axis=-1) for logits in pair)
    expectation = (np.exp(policy) * k3(policy, reference)).sum(axis=-1)
    np.testing.assert_allclose(expectation, exact_kl(*pair), rtol=1e-9, atol=1e-12)


def test_off_policy_samples_bias_k1_and_k3_until_weighted_by_the_policy_ratio():
    old = np.array([0.5, 0.3, 0.2])
    assert old @ k3(LOG_P, LOG_Q) == pytest.approx(0.7757, abs=5e-5)
    assert old @ k1(LOG_P, LOG_Q) == pytest.approx(0.1829, abs=5e-5)
    weights = P / old
    assert old @ (weights * k3(LOG_P, LOG_Q)) == pytest.approx(KL_PQ, abs=5e-11)
    assert old @ (weights * k1(LOG_P, LOG_Q)) == pytest.approx(KL_PQ, abs=5e-11)


def test_under_truncated_sampling_only_k1_on_processed_logprobs_is_unbiased():
    raw = np.log([0.5, 0.25, 0.125, 0.125])
    processed = log_softmax([raw[0], raw[1], -INF, -INF], axis=-1)
    uniform = np.log([0.25] * 4)
    sampled, kept = np.exp(processed[:2]), slice(2)
    true_kl = exact_kl(processed, uniform)
    assert true_kl == pytest.approx(0.7498, abs=5e-5)
    assert sampled @ k1(processed[kept], uniform[kept]) == pytest.approx(true_kl, abs=1e-12)
    assert sampled @ k3(processed[kept], uniform[kept]) == pytest.approx(0.2498, abs=5e-5)
    assert sampled @ k3(raw[kept], uniform[kept]) == pytest.approx(0.1288, abs=5e-5)
    assert sampled @ k1(raw[kept], uniform[kept]) == pytest.approx(0.4621, abs=5e-5)


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_a_reference_probability_of_0_gives_an_infinite_estimate(estimator):
    assert estimator([-1.0], [-INF]) == INF


@pytest.mark.parametrize(("estimator", "estimate"), [(k1, -INF), (k2, INF), (k3, INF)])
def test_a_policy_probability_of_0_gives_an_infinite_estimate(estimator, estimate):
    assert estimator([-INF], [-1.0]) == estimate


def test_k3_and_k2_of_ratios_beyond_float64_are_inf():
    assert k3(-800.0, -0.1) == INF
    assert k2(-1e200, -0.1) == INF


def test_equal_logprobs_give_0_not_minus_0():
    for estimator in (k1, k2, k3):
        assert str(float(estimator(-1.5, -1.5))) == "0.0"


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_two_probabilities_of_0_are_refused_for_their_ratio_is_undefined(estimator):
    with pytest.raises(ValueError, match=r"both probabilities are 0 at 1 of 2 tokens"):
        estimator([-INF, -1.0], [-INF, -1.0])


@pytest.mark.parametrize("function", [k1, k2, k3, summarize])
@pytest.mark.parametrize("value", [float("nan"), INF])
def test_nan_and_plus_inf_logprobs_are_refused_by_name(function, value):
    with pytest.raises(ValueError, match=r"reference_logprobs holds NaN or \+inf at 1 of 2"):
        function([-1.0, -1.0], [value, -1.0])
    with pytest.raises(ValueError, match=r"policy_logprobs holds NaN"):
        function([value, -1.0], [-1.0, -1.0])


@pytest.mark.parametrize("function", [k1, k2, k3, summarize])
def test_logprobs_of_two_shapes_are_refused_with_both(function):
    with pytest.raises(ValueError, match=r"shape \(2,\) and reference_logprobs \(1,\)"):
        function([-1.0, -1.0], [-1.0])


# Sampled: summarize


def test_summary_adds_up_the_per_token_estimates():
    summary = summarize(LOG_P, LOG_Q)
    for name, estimator in (("k1", k1), ("k2", k2), ("k3", k3)):
        estimates = estimator(LOG_P, LOG_Q)
        assert getattr(summary, f"{name}_sum") == pytest.approx(estimates.sum())
        assert getattr(summary, f"{name}_mean") == pytest.approx(estimates.mean())
    assert (summary.num_tokens, summary.num_finite_tokens, summary.nonfinite_tokens) == (3, 3, 0)
    assert summary.max_abs_log_ratio == pytest.approx(np.log(5))


def test_summary_sums_k3_per_token_not_over_the_sequence_ratio():
    policy, reference = np.array([-1.0, -2.0]), np.array([-1.5, -1.0])
    over_sequence = float(k3(policy.sum(), reference.sum()))
    assert summarize(policy, reference).k3_sum == pytest.approx(0.824812, abs=1e-6)
    assert over_sequence == pytest.approx(0.148721, abs=5e-7)


@pytest.mark.parametrize(
    ("policy", "reference"),
    [(-1.0, -INF), (-INF, -1.0), (-INF, -INF), (-800.0, -0.1), (-1e200, -0.1), (-0.1, -1e200)],
)
def test_nonfinite_tokens_are_counted_and_left_out_of_everything_else(policy, reference):
    summary = summarize([-1.0, policy], [-1.5, reference])
    assert (summary.num_tokens, summary.nonfinite_tokens, summary.num_finite_tokens) == (2, 1, 1)
    assert summary.large_ratio_tokens == 0
    assert summary.k1_sum == summary.k1_mean == summary.max_abs_log_ratio == 0.5
    assert summary.k3_mean == pytest.approx(float(k3(-1.0, -1.5)))


@pytest.mark.parametrize("logprobs", [([], []), ([-1.0], [-INF])])
def test_a_summary_of_no_finite_token_has_no_means(logprobs):
    summary = summarize(*logprobs)
    assert (summary.k1_sum, summary.k2_sum, summary.k3_sum) == (0.0, 0.0, 0.0)
    assert (summary.k1_mean, summary.k2_mean, summary.k3_mean) == (None, None, None)
    assert summary.max_abs_log_ratio is None
    assert summary.nonfinite_tokens == summary.num_tokens


def test_large_ratios_are_counted_and_not_clamped():
    summary = summarize([-1.0, -1.0, -12.0], [-6.0, -7.0, -1.0])
    assert summary.large_ratio_tokens == 2  # 5 nats are not above 5
    assert summary.max_abs_log_ratio == 11.0
    assert summary.k3_sum == pytest.approx(np.expm1([-5, -6, 11]).sum() + 5 + 6 - 11)


def test_a_sum_beyond_float64_is_inf():
    assert summarize([-709.5] * 4, [0.0] * 4).k3_sum == INF


@given(st.lists(st.tuples(st.floats(-50, 0), st.floats(-50, 0)), min_size=1), st.randoms())
def test_summary_does_not_depend_on_the_order_of_tokens(tokens, random):
    shuffled = random.sample(tokens, len(tokens))
    summary, again = (summarize(*np.transpose(order)) for order in (tokens, shuffled))
    assert summary.k3_sum == pytest.approx(again.k3_sum, rel=1e-12)
    assert summary.max_abs_log_ratio == again.max_abs_log_ratio


# Exact


def test_exact_kl_gives_the_reference_values_in_both_directions():
    assert exact_kl(LOG_P, LOG_Q) == pytest.approx(KL_PQ, abs=5e-11)
    assert exact_kl(LOG_Q, LOG_P) == pytest.approx(KL_QP, abs=5e-11)


@given(logits_pairs())
def test_exact_kl_is_the_slow_obvious_sum_and_never_negative(pair):
    policy, reference = (log_softmax(logits, axis=-1) for logits in pair)
    kl = exact_kl(*pair)
    assert kl.shape == pair[0].shape[:-1]
    assert (kl >= 0).all()
    slow = [
        sum(np.exp(p) * (p - q) for p, q in zip(*position, strict=True))
        for position in zip(
            policy.reshape(-1, policy.shape[-1]),
            reference.reshape(-1, policy.shape[-1]),
            strict=True,
        )
    ]
    np.testing.assert_allclose(kl.ravel(), slow, rtol=1e-9, atol=1e-13)


@given(logits_pairs(), st.floats(-1000, 1000))
def test_exact_kl_does_not_depend_on_the_scale_of_the_odds(pair, shift):
    np.testing.assert_allclose(
        exact_kl(pair[0] + shift, pair[1]), exact_kl(*pair), rtol=1e-6, atol=1e-10
    )


@given(hnp.arrays(np.float32, (2, 5), elements=st.floats(-40, 40, width=32)))
def test_exact_kl_of_a_model_against_itself_is_exactly_0(logits):
    assert exact_kl(logits, logits).tolist() == [0.0, 0.0]


def test_exact_kl_keeps_its_digits_between_models_that_hardly_differ():
    policy = np.linspace(-3, 3, 50)
    change = 1e-9 * np.cos(np.arange(50))
    probs = np.exp(log_softmax(policy, axis=-1))
    second_order = 0.5 * (probs @ change**2 - (probs @ change) ** 2)
    assert exact_kl(policy, policy + change) == pytest.approx(second_order, rel=1e-4)


def test_exact_kl_of_float32_logits_loses_no_precision():
    policy, reference = LOG_P.astype(np.float32), LOG_Q.astype(np.float32)
    same = exact_kl(policy.astype(np.float64), reference.astype(np.float64))
    assert exact_kl(policy, reference) == same


def test_exact_kl_takes_mass_the_policy_lacks_as_0_times_log_0():
    masked = [0.0, 0.0, -INF]
    assert exact_kl(masked, np.log([0.25, 0.25, 0.5])) == pytest.approx(np.log(2))
    assert exact_kl(masked, masked) == 0.0


def test_exact_kl_is_inf_where_the_reference_lacks_mass_the_policy_has():
    kl = exact_kl([[0.0, 0.0], [0.0, -INF], [0.0, -800.0]], [[0.0, -INF]] * 3)
    assert kl.tolist() == [INF, 0.0, INF]


def test_exact_kl_takes_the_lowest_float_as_a_mask():
    lowest = float(np.finfo(np.float32).min)
    assert exact_kl([0.0, lowest], [0.0, 0.0]) == pytest.approx(np.log(2))


def test_exact_kl_is_finite_where_policy_mass_underflows():
    assert exact_kl([0.0, -800.0], [-800.0, 0.0]) == pytest.approx(800.0)


def test_top_k_teachers_are_compared_with_their_tail_as_one_bucket():
    teacher, student = np.array([0.6, 0.3, 0.07, 0.03]), np.array([0.4, 0.3, 0.2, 0.1])
    full = exact_kl(np.log(teacher), np.log(student))
    bucketed = [np.log([*probs[:2], probs[2:].sum()]) for probs in (teacher, student)]
    tail_bucket = exact_kl(*bucketed)
    renormalised = exact_kl(np.log(teacher[:2]), np.log(student[:2]))
    dropped = teacher[:2] @ k1(np.log(teacher[:2]), np.log(student[:2]))
    assert full == pytest.approx(0.1336723, abs=5e-8)
    assert tail_bucket == pytest.approx(0.1334178, abs=5e-8)
    assert renormalised == pytest.approx(0.0189956, abs=5e-8)
    assert dropped == pytest.approx(0.2432791, abs=5e-8)


@pytest.mark.parametrize(
    ("temperature", "kl"), [(1.0, 0.2662167), (2.0, 0.0784210), (4.0, 0.0205126)]
)
def test_exact_kl_gives_the_distillation_reference_values(temperature, kl):
    teacher, student = np.array([2.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0])
    assert exact_kl(teacher / temperature, student / temperature) == pytest.approx(kl, abs=5e-8)


def test_argmax_agreement_is_per_position_with_ties_to_the_lowest_id():
    policy = [[[3.0, 1.0], [1.0, 3.0]], [[2.0, 2.0], [-INF, 0.0]]]
    reference = [[[9.0, 0.0], [9.0, 0.0]], [[9.0, 0.0], [-1.0, 0.0]]]
    assert argmax_agreement(policy, reference).tolist() == [[True, False], [True, True]]


@given(logits_pairs())
def test_predicted_acceptance_is_1_minus_total_variation(pair):
    p, q = (np.exp(log_softmax(logits, axis=-1)) for logits in pair)
    total_variation = 0.5 * np.abs(p - q).sum(axis=-1)
    np.testing.assert_allclose(predicted_acceptance(*pair), 1 - total_variation, atol=1e-12)


def test_predicted_acceptance_of_masked_supports_is_their_overlap():
    logits = [[0.0, -INF], [0.0, 0.0]]
    assert predicted_acceptance(logits, [[-INF, 0.0], [0.0, -INF]]).tolist() == [0.0, 0.5]


EXACT = [exact_kl, argmax_agreement, predicted_acceptance]


@pytest.mark.parametrize("function", EXACT)
def test_logits_of_two_shapes_are_refused_with_both(function):
    with pytest.raises(ValueError, match=r"shape \(1, 3\) and \w+_logits \(3,\)"):
        function([[0.0, 1.0, 2.0]], [0.0, 1.0, 2.0])


@pytest.mark.parametrize("function", EXACT)
@pytest.mark.parametrize("value", [float("nan"), INF])
def test_nan_and_plus_inf_logits_are_refused_by_name(function, value):
    with pytest.raises(ValueError, match=r"(policy|p)_logits holds NaN or \+inf at 1 of 2"):
        function([value, 0.0], [0.0, 0.0])
    with pytest.raises(ValueError, match=r"(reference|q)_logits holds NaN or \+inf at 1 of 2"):
        function([0.0, 0.0], [value, 0.0])


@pytest.mark.parametrize("function", EXACT)
def test_positions_with_every_entry_masked_are_refused(function):
    with pytest.raises(ValueError, match=r"masks every entry at 1 of 2 positions"):
        function([[-INF, -INF], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]])


@pytest.mark.parametrize("logits", [1.0, np.zeros((2, 0))])
def test_logits_without_a_vocabulary_are_refused(logits):
    with pytest.raises(ValueError, match="its last axis must be the vocabulary"):
        exact_kl(logits, logits)


def test_no_positions_give_no_results():
    empty = np.zeros((0, 5))
    assert [function(empty, empty).shape for function in EXACT] == [(0,)] * 3
