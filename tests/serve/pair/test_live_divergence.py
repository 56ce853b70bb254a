"""What `/metrics` says about a run is what its responses say, and the estimate is honest."""

from __future__ import annotations

import math
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from protos.tandem.v1 import inference_pb2 as pb

NUM_REQUESTS = 40
Run = tuple[list[pb.Sample], dict[tuple[str, str], float], dict[tuple[str, str], float]]
ROLES = {"student": pb.ROLE_STUDENT, "teacher": pb.ROLE_TEACHER}


@pytest.fixture(scope="module")
def run(serving: Any, make_pair: Any) -> Iterator[Run]:
    """Samples of both models with exact KL; nats and tokens by (estimator, policy) of a scrape."""
    with serving(make_pair()) as live:
        samples: list[pb.Sample] = []
        for number in range(NUM_REQUESTS):
            request = pb.CompareRequest(
                prompt=f"{number}?",
                sampling=pb.SamplingParams(num_samples=4, max_tokens=30, seed=number),
                divergence=pb.DivergenceOptions(exact=True, per_token=True),
            )
            samples += live.client.compare(request).samples
        with urllib.request.urlopen(live.server.metrics_url, timeout=10) as reply:
            families = list(text_string_to_metric_families(reply.read().decode()))
    yield (
        samples,
        values(families, "tandem_divergence_nats_sum_total"),
        values(families, "tandem_divergence_tokens_total"),
    )


def values(families: list[Any], name: str) -> dict[tuple[str, str], float]:
    return {
        (sample.labels["estimator"], sample.labels["policy"]): sample.value
        for family in families
        for sample in family.samples
        if sample.name == name
    }


def divergences(samples: list[pb.Sample], policy: str) -> list[pb.Divergence]:
    return [s.divergence for s in samples if s.role == ROLES[policy]]


@pytest.mark.parametrize("policy", ROLES)
def test_exact_kl_lies_in_the_interval_of_k3(run: Run, policy: str) -> None:
    """95 % interval of a ratio of sums, samples as clusters (tokens of one are not independent)."""
    samples, nats, tokens = run
    found = divergences(samples, policy)
    sums = np.array([d.k3_sum for d in found])
    counts = np.array([d.num_tokens for d in found])
    mean = sums.sum() / counts.sum()
    residuals = sums - mean * counts
    standard_error = math.sqrt((residuals**2).sum() * len(found) / (len(found) - 1)) / counts.sum()
    exact = nats["exact", policy] / tokens["exact", policy]
    offline = sum(d.exact_mean * d.num_tokens for d in found) / counts.sum()
    assert exact == pytest.approx(offline, abs=1e-6)
    assert abs(exact - mean) <= 1.96 * standard_error
    assert standard_error < 0.2 * mean, "an interval that wide would say nothing"
