"""Correctness, agreement and divergence of recorded requests, by hand."""

from __future__ import annotations

import math

import pytest

from loadtest.analysis.quality import (
    agreement_share,
    correctness_p,
    differences,
    majority_correct,
    quality,
)
from loadtest.analysis.statistics import wilson
from loadtest.records import RequestRecord, SampleRecord
from tests.support.load_tests import planned, recorded

RIGHT = "4"


def record(prompt: str, answers: list[str | None], *, judged: bool = True) -> RequestRecord:
    samples = [
        SampleRecord(i, answer=answer, is_correct=answer == RIGHT if judged else None)
        for i, answer in enumerate(answers)
    ]
    return recorded(planned(prompt_id=prompt), samples=samples)


def with_k3(prompt: str, *k3s: list[float]) -> RequestRecord:
    """A request whose samples have these k3 per token, their exact KL half of it."""
    request = record(prompt, [None] * len(k3s), judged=False)
    for sample, per_token in zip(request.samples, k3s, strict=True):
        finite = [k3 for k3 in per_token if math.isfinite(k3)]
        sample.per_token_k3, sample.num_kl_tokens = per_token, len(finite)
        sample.k3_sum = sum(finite)
        sample.exact_kl_mean = sum(finite) / len(finite) / 2 if finite else None
    return request


def test_pass_at_k_is_unbiased_and_averaged_over_requests() -> None:
    """1 of 4 right: pass@2 = 1 − C(3, 2) / C(4, 2) = 1/2. None of 4: 0."""
    found = quality([record("a", ["4", "5", "6", None]), record("b", ["1"] * 4)], [1, 2, 4])
    assert found is not None
    values = {k: each.value for k, each in found.pass_at_k.items()}
    assert values == pytest.approx({1: 0.125, 2: 0.25, 4: 0.5})
    assert found.pass_at_k[1].n == 2
    assert (found.k3, found.exact_kl, found.k3_histogram, found.k3_by_position) == (
        None, None, None, (),
    )  # fmt: skip


def test_k_beyond_the_samples_is_left_out() -> None:
    found = quality([record("a", ["4", "5"])], [1, 8])
    assert found is not None and list(found.pass_at_k) == [1]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [(["4", "4", "5"], 1), (["5", "5", "4"], 0), (["4", "5"], 0.5), ([None, ""], 0)],
)
def test_majority_is_right_wrong_tied_or_missing(
    answers: list[str | None], expected: float
) -> None:
    assert majority_correct(record("a", answers)) == expected


def test_prompt_asked_often_counts_as_one_in_the_interval() -> None:
    found = quality([record("a", ["4"]) for _ in range(50)], [1])
    assert found is not None
    assert (found.pass_at_k[1].low, found.pass_at_k[1].n) == (wilson(1, 1).low, 50)


def test_requests_that_nobody_judged_have_no_quality() -> None:
    assert quality([record("a", ["4"], judged=False)], [1]) is None
    assert quality([], [1]) is None


def test_divergence_is_the_ratio_of_sums() -> None:
    """(1 + 2 + 3 + 6) over 4 tokens, not the mean of the samples' means 1.5, 3, 6."""
    found = quality([with_k3("a", [1.0, 2.0], [3.0]), with_k3("b", [6.0])], [1])
    assert found is not None and found.k3 is not None and found.exact_kl is not None
    assert (found.k3.value, found.k3.n, found.exact_kl.value) == (3.0, 4, 1.5)
    assert found.k3.low is not None and found.k3.low >= 2 and found.pass_at_k == {}
    assert [each.value for each in found.k3_by_position] == [10 / 3, 2.0]
    assert [each.n for each in found.k3_by_position] == [3, 1]
    assert found.k3_histogram is not None and sum(found.k3_histogram.counts) == 4


def test_tokens_without_a_finite_divergence_are_left_out() -> None:
    found = quality([with_k3("a", [1.0, math.nan]), with_k3("b", [math.nan])], [1])
    assert found is not None and found.k3 is not None
    assert (found.k3.value, found.k3.n) == (1.0, 1)
    assert [each.value for each in found.k3_by_position] == [1.0]


def test_differences_are_a_minus_b_over_pairs_that_both_have() -> None:
    pairs = [
        (record("a", ["4", "4"]), record("a", ["4", "5"])),
        (record("b", ["1", "1"]), record("b", ["4", "4"])),
        (record("c", ["4", "4"]), record("c", ["4", "4"], judged=False)),
    ]
    found = differences(pairs, [1, 2, 4])
    # pass@1: (1 − 0.5 + 0 − 1) / 2; pass@2: (1 − 1 + 0 − 1) / 2; majority as pass@1, by the tie.
    assert {name: each.value for name, each in found.items()} == {
        "pass@1": -0.25, "pass@2": -0.5, "majority": -0.25,
    }  # fmt: skip
    assert differences(pairs[2:], [1]) == {}


def test_agreement_is_of_majorities_that_exist() -> None:
    pairs = [
        (record("a", ["7", "7", "4"]), record("a", ["7"])),
        (record("b", ["7"]), record("b", ["8"])),
        (record("c", ["7", "8"]), record("c", ["7"])),
        (record("d", [None]), record("d", ["7"])),
    ]
    found = agreement_share(pairs)
    assert found is not None and (found.value, found.n) == (0.5, 2)
    assert agreement_share(pairs[2:]) is None


def test_mcnemar_takes_one_pair_per_prompt() -> None:
    """5 prompts where only b is right, each asked 3 times, are 5 pairs: p = 2 / 2⁵."""
    pairs = [(record(f"{i}", ["1"]), record(f"{i}", ["4"])) for i in range(5) for _ in range(3)]
    assert correctness_p(pairs) == 0.0625
    assert correctness_p([(a, a) for a, _ in pairs]) == 1.0
    assert correctness_p([(record("a", ["4"], judged=False), record("a", ["4"]))]) is None
