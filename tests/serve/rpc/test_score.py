"""Score through a real channel, over real engines and fake models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from protos.tandem.v1 import inference_pb2 as pb


def test_score_gives_the_logprobs_of_a_sample_back(live: Any) -> None:
    sampling = pb.SamplingParams(num_samples=2, temperature=0.8, max_tokens=12)
    response = live.client.compare(pb.CompareRequest(prompt="x", sampling=sampling))
    sample = response.samples[1]
    completion = pb.Completion(token_ids=pb.TokenIds(ids=sample.token_ids))
    scored = live.client.score(
        pb.ScoreRequest(prompt="x", completions=[completion], temperature=0.8)
    )
    student, teacher = scored.scores
    assert (student.role, teacher.role) == (pb.ROLE_STUDENT, pb.ROLE_TEACHER)
    np.testing.assert_allclose(student.logprobs, sample.logprobs, atol=1e-3)
    np.testing.assert_allclose(teacher.logprobs, sample.divergence.reference_logprobs, atol=1e-3)
    assert student.sum_logprob == pytest.approx(sum(student.logprobs))
    assert student.divergence.k3_sum == pytest.approx(sample.divergence.k3_sum, abs=1e-5)
    assert teacher.divergence.policy == pb.ROLE_TEACHER


def test_greedy_sample_is_greedy_to_its_own_model_alone(live: Any) -> None:
    sampling = pb.SamplingParams(temperature=0, max_tokens=12)
    sample = live.client.compare(pb.CompareRequest(prompt="x", sampling=sampling)).samples[0]
    completion = pb.Completion(token_ids=pb.TokenIds(ids=sample.token_ids))
    scored = live.client.score(pb.ScoreRequest(prompt="x", completions=[completion]))
    student, teacher = (list(score.is_greedy) for score in scored.scores)
    assert student == [True] * len(sample.token_ids)
    assert len(teacher) == len(student) and not all(teacher)


def test_score_takes_text_and_one_role(live: Any) -> None:
    completions = [pb.Completion(text="ab"), pb.Completion(text="c")]
    response = live.client.score(
        pb.ScoreRequest(prompt="x", completions=completions, roles=[pb.ROLE_TEACHER])
    )
    assert [(s.role, s.index, len(s.token_ids)) for s in response.scores] == [
        (pb.ROLE_TEACHER, 0, 2),
        (pb.ROLE_TEACHER, 1, 1),
    ]
    assert not any(score.HasField("divergence") for score in response.scores)
    assert response.usage.roles[0].completion_tokens == 3


@pytest.mark.parametrize("basis", [pb.BASIS_TEMPERED, pb.BASIS_RAW])
def test_score_with_exact_divergence(live: Any, basis: pb.Basis) -> None:
    completions = [pb.Completion(text="ab"), pb.Completion(text="c")]
    options = pb.DivergenceOptions(exact=True, basis=basis)
    response = live.client.score(
        pb.ScoreRequest(prompt="x", completions=completions, divergence=options)
    )
    student, teacher = response.scores[:2], response.scores[2:]
    for one, other in zip(student, teacher, strict=True):
        assert one.divergence.basis == other.divergence.basis == basis
        assert one.divergence.exact_mean > 0 and other.divergence.exact_mean > 0
        assert one.divergence.argmax_agreement == other.divergence.argmax_agreement
