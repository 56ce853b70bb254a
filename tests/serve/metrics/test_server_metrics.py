"""What the metrics say equals what the responses said."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric

from protos.tandem.v1 import inference_pb2 as pb
from serve.metrics.families import NATS, SECONDS
from serve.metrics.server_metrics import ServerMetrics
from serve.pair.answers.equivalence import NoResult
from serve.pair.answers.judge import Judgement
from serve.pair.observer import ShadowOutcome
from serve.pair.served import Role

ROLES = {pb.ROLE_STUDENT: "student", pb.ROLE_TEACHER: "teacher"}
# The table of design/api.md, literally: name, type, labels. `answers_undecided_total` is ours.
CONTRACT = """
requests_total                      counter    rpc route code task
samples_total                       counter    role finish_reason
request_duration_seconds            histogram  role
request_queue_seconds               histogram  role
time_to_first_token_seconds         histogram  role
inter_token_latency_seconds         histogram  role
engine_step_seconds                 histogram  role phase
engine_host_seconds                 histogram  role
prompt_tokens_total                 counter    role
generation_tokens_total             counter    role
cached_prompt_tokens_total          counter    role
wasted_tokens_total                 counter    role reason
sequences_running                   gauge      role
sequences_waiting                   gauge      role
batch_size                          gauge      role
kv_slots_used_ratio                 gauge      role
divergence_nats                     histogram  estimator policy task
divergence_nats_sum_total           counter    estimator policy task
divergence_tokens_total             counter    estimator policy task
divergence_nonfinite_tokens_total   counter    policy
divergence_truncated_samples_total  counter    policy
argmax_agreeing_tokens_total        counter    task
compared_tokens_total               counter    task
predicted_acceptance_sum_total      counter    task
consensus_total                     counter    outcome task
consensus_vote_share                histogram  role
answers_undecided_total             counter    reason
pass_at_k_sum_total                 counter    role k reference task
pass_at_k_prompts_total             counter    role k reference task
shadow_total                        counter    outcome
admission_rejections_total          counter    reason
ledger_imbalance                    gauge
draining                            gauge
build_info                          gauge      version
model_info                          gauge      role backend device precision manifest
model_up                            gauge      role
remote_calls_total                  counter    rpc code
"""


@pytest.fixture(scope="module")
def answered(serving: Any, make_pair: Any) -> Any:
    """A pair that answered three prompts, and the responses."""
    pair = make_pair()
    with serving(pair, tasks=frozenset({"sums"})) as live:
        responses = [
            live.client.compare(
                pb.CompareRequest(
                    prompt=prompt,
                    sampling=pb.SamplingParams(num_samples=4, max_tokens=10, top_k=40),
                    divergence=pb.DivergenceOptions(exact=True),
                    evaluation=pb.EvaluationOptions(
                        answer_format="last_number", task="sums", pass_at_k=[1, 4], **gold
                    ),
                )
            )
            for prompt, gold in [("1+1=", {"reference_answer": "2"}), ("a", {}), ("b", {})]
        ]
    return pair, responses


def test_cached_prompt_tokens_are_in_usage_and_metrics(serving: Any, make_pair: Any) -> None:
    pair = make_pair()
    with serving(pair) as live:
        request = pb.CompareRequest(prompt="again", sampling=pb.SamplingParams(max_tokens=2))
        first, again = live.client.compare(request), live.client.compare(request)
    for index, label in enumerate(("student", "teacher")):
        usages = [response.usage.roles[index] for response in (first, again)]
        assert usages[1].cached_prompt_tokens == usages[1].prompt_tokens > 0
        cached = sum(usage.cached_prompt_tokens for usage in usages)
        assert pair.value("cached_prompt_tokens_total", role=label) == cached


def samples(responses: list[pb.CompareResponse], role: int) -> list[pb.Sample]:
    return [s for response in responses for s in response.samples if s.role == role]


@pytest.mark.parametrize(("role", "label"), ROLES.items())
def test_tokens_equal_those_of_the_responses(answered: Any, role: int, label: str) -> None:
    pair, responses = answered
    usages = [u for response in responses for u in response.usage.roles if u.role == role]
    prompt, completion = (
        sum(getattr(usage, name) for usage in usages)
        for name in ("prompt_tokens", "completion_tokens")
    )
    assert pair.value("prompt_tokens_total", role=label) == prompt
    assert pair.value("generation_tokens_total", role=label) == completion
    assert pair.value("time_to_first_token_seconds_count", role=label) == len(responses)
    assert pair.value("request_queue_seconds_count", role=label) == len(responses)


@pytest.mark.parametrize(("role", "label"), ROLES.items())
def test_samples_by_finish_reason_equal_those_of_the_responses(
    answered: Any, role: int, label: str
) -> None:
    pair, responses = answered
    counts = Counter(int(sample.finish_reason) for sample in samples(responses, role))
    for name, number in pb.FinishReason.items():
        reason = name.removeprefix("FINISH_REASON_").lower()
        counted = pair.value("samples_total", role=label, finish_reason=reason)
        assert counted == counts[number]


@pytest.mark.parametrize(("role", "label"), ROLES.items())
def test_divergence_sums_equal_those_of_the_responses(answered: Any, role: int, label: str) -> None:
    pair, responses = answered
    divergences = [sample.divergence for sample in samples(responses, role)]
    labels = {"policy": label, "task": "sums"}
    sums = {
        "k3": sum(d.k3_sum for d in divergences),
        "exact": sum(d.exact_mean * d.num_tokens for d in divergences),
    }
    for estimator, expected in sums.items():
        of_estimator = {**labels, "estimator": estimator}
        total = pair.value("divergence_nats_sum_total", **of_estimator)
        assert total == pytest.approx(expected)
        num_tokens = pair.value("divergence_tokens_total", **of_estimator)
        assert num_tokens == sum(d.num_tokens for d in divergences)
    for estimator in ("k1", "k2", "k3"):
        # A histogram with negative buckets has neither sum nor count.
        samples_up_to = {"le": "+Inf", **labels, "estimator": estimator}
        assert pair.value("divergence_nats_bucket", **samples_up_to) == len(divergences)
    assert pair.value("divergence_truncated_samples_total", policy=label) == 12


def test_full_vocabulary_sums_equal_those_of_the_responses(answered: Any) -> None:
    pair, responses = answered
    divergences = [s.divergence for response in responses for s in response.samples]
    expected = {
        "compared_tokens_total": sum(d.num_tokens for d in divergences),
        "argmax_agreeing_tokens_total": sum(d.argmax_agreement * d.num_tokens for d in divergences),
        "predicted_acceptance_sum_total": sum(
            d.predicted_acceptance * d.num_tokens for d in divergences
        ),
    }
    for name, value in expected.items():
        assert pair.value(name, task="sums") == pytest.approx(value)


def test_consensus_outcomes_equal_those_of_the_responses(answered: Any) -> None:
    pair, responses = answered
    expected = Counter(outcome(response.agreement) for response in responses)
    for name in ("agree", "disagree", "no_majority", "invalid"):
        assert pair.value("consensus_total", outcome=name, task="sums") == expected[name]


def outcome(agreement: pb.Agreement) -> str:
    if not (agreement.student.num_valid and agreement.teacher.num_valid):
        return "invalid"
    if not agreement.HasField("same_answer"):
        return "no_majority"
    return "agree" if agreement.same_answer else "disagree"


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_pass_at_k_sums_equal_those_of_the_responses(answered: Any, role: str, k: int) -> None:
    pair, responses = answered
    for label, kind in (
        ("gold", pb.REFERENCE_KIND_GOLD),
        ("teacher_consensus", pb.REFERENCE_KIND_TEACHER_CONSENSUS),
    ):
        values = [
            getattr(r.agreement, f"{role}_pass_at_k")[k]
            for r in responses
            if r.agreement.reference_kind == kind
        ]
        labels = {"role": role, "k": str(k), "reference": label, "task": "sums"}
        assert pair.value("pass_at_k_sum_total", **labels) == pytest.approx(sum(values))
        assert pair.value("pass_at_k_prompts_total", **labels) == len(values)


def test_calls_are_counted_by_code(serving: Any, make_pair: Any) -> None:
    pair = make_pair()
    with serving(pair) as live:
        for _ in range(2):
            live.client.compare(pb.CompareRequest(prompt="x"))
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            live.client.compare(pb.CompareRequest())
    labels = {"rpc": "Compare", "task": "other"}
    assert pair.value("requests_total", **labels, route="both", code="OK") == 2
    refused = pair.value("requests_total", **labels, route="none", code="INVALID_ARGUMENT")
    assert refused == 1


def families(metrics: ServerMetrics) -> dict[str, tuple[Any, Metric]]:
    """Return the attribute and what it collects, without a label set, by exposed name."""
    collected = {
        metric: next(iter(metric.collect()))
        for metric in vars(metrics).values()
        if isinstance(metric, MetricWrapperBase)
    }
    return {exposed_name(family): (metric, family) for metric, family in collected.items()}


def exposed_name(family: Metric) -> str:
    return f"{family.name}_total" if family.type == "counter" else str(family.name)


def test_server_metrics_have_the_names_types_and_labels_of_the_contract() -> None:
    metrics = ServerMetrics(CollectorRegistry())
    lines = [line.split() for line in CONTRACT.strip().splitlines()]
    expected = {f"tandem_{name}": (kind, labels) for name, kind, *labels in lines}
    found = families(metrics)
    assert {name: family.type for name, (_, family) in found.items()} == {
        name: kind for name, (kind, _) in expected.items()
    }
    exposed = list(metrics.registry.collect())
    assert {exposed_name(family) for family in exposed} == set(expected)
    assert all(family.documentation for family in exposed)
    for name, (_, labels) in expected.items():
        if labels:  # ValueError for other labels
            found[name][0].labels(**dict.fromkeys(labels, "x"))
        else:
            assert [sample.labels for sample in found[name][1].samples] == [{}]


def test_buckets_reach_from_half_a_millisecond_to_ten_minutes_and_below_zero_nats() -> None:
    assert (SECONDS[0], SECONDS[-1], NATS[0]) == (0.0005, 600, -2)
    metrics = ServerMetrics(CollectorRegistry())
    seconds = {name for name in families(metrics) if name.endswith("_seconds")}
    assert len(seconds) == 6
    metrics.observer(Role.STUDENT)
    bounds = {
        (sample.name.removesuffix("_bucket"), sample.labels["le"])
        for family in metrics.registry.collect()
        for sample in family.samples
        if "le" in sample.labels
    }
    assert {(name, str(bound)) for name in seconds for bound in SECONDS} <= bounds


def test_closed_sets_are_counted_from_zero(make_pair: Any) -> None:
    registry = make_pair().metrics.registry
    closed: dict[str, dict[str, Iterable[str]]] = {
        "shadow_total": {"outcome": ["compared", "dropped", "error", "deadline"]},
        "admission_rejections_total": {
            "reason": ["queue_full", "draining", "unauthenticated", "peer_limit"]
        },
        "answers_undecided_total": {"reason": ["timeout", "failed", "dropped"]},
        "samples_total": {
            "role": ROLES.values(),
            "finish_reason": ["stop", "length", "cancelled", "deadline", "error", "shutdown"],
        },
        "wasted_tokens_total": {
            "role": ROLES.values(),
            "reason": ["cancelled", "deadline", "error", "shutdown"],
        },
    }
    for name, sets in closed.items():
        for values in itertools.product(*sets.values()):
            labels = dict(zip(sets, values, strict=True))
            assert registry.get_sample_value(f"tandem_{name}", labels) == 0


def test_load_is_read_at_every_scrape(serving: Any, make_pair: Any) -> None:
    pair = make_pair(max_num_seqs=4)
    backend = pair.backends[Role.STUDENT]
    names = ("sequences_running", "sequences_waiting", "kv_slots_used_ratio")
    with serving(pair) as live:
        backend.may_run.clear()
        sampling = pb.SamplingParams(num_samples=6, max_tokens=5)
        stream = live.stub.Generate(pb.GenerateRequest(prompt="x", sampling=sampling))
        assert backend.is_asked.wait(10)
        assert [pair.value(name, role="student") for name in names] == [4, 2, 1.0]
        backend.may_run.set()
        assert list(stream)
        assert [pair.value(name, role="student") for name in names] == [0, 0, 0]


def test_models_are_labelled(live: Any) -> None:
    labels = {"role": "student", "backend": "fake", "device": "cpu", "precision": "float32"}
    assert live.pair.value("model_info", **labels, manifest="ab" * 32) == 1


def test_build_is_labelled(live: Any) -> None:
    (family,) = (f for f in live.pair.metrics.registry.collect() if f.name == "tandem_build_info")
    assert [sample.value for sample in family.samples] == [1]


# Cardinality: nothing that a client writes becomes a label


def request_of(number: int) -> pb.CompareRequest:
    """A request of which no text was ever in another one."""
    return pb.CompareRequest(
        request_id=f"id {number}",
        prompt=f"prompt {number}",
        sampling=pb.SamplingParams(num_samples=4, max_tokens=3, stop=[f"stop {number}"]),
        evaluation=pb.EvaluationOptions(
            answer_format="last_number",
            task="sums" if number % 2 else f"task {number}",
            reference_answer=str(number),
            pass_at_k=[1 + number % 4],
        ),
    )


def test_undecided_samples_are_counted_by_reason() -> None:
    metrics = ServerMetrics(CollectorRegistry())
    undecided = {NoResult.TIMEOUT: 2, NoResult.DROPPED: 1}
    metrics.on_judgement(Judgement({}, {}, None, undecided), "other")
    values = {
        reason.value: metrics.registry.get_sample_value(
            "tandem_answers_undecided_total", {"reason": reason.value}
        )
        for reason in NoResult
    }
    assert values == {"timeout": 2, "failed": 0, "dropped": 1}


def test_labels_of_a_server_are_of_closed_sets(serving: Any, make_pair: Any) -> None:
    pair = make_pair()
    with serving(pair, tasks=frozenset({"sums"})) as live:
        for number in range(30):
            live.client.compare(request_of(number))
    allowed = {
        "task": {"sums", "other"},
        "role": {"student", "teacher"},
        "policy": {"student", "teacher"},
        "k": {str(k) for k in range(1, 65)},
        "reference": {"gold", "teacher_consensus"},
        "outcome": {"agree", "disagree", "no_majority", "invalid"},
    }
    assert not any(
        re.search(r"(id|prompt|stop|task) \d", value)
        for family in pair.metrics.registry.collect()
        for sample in family.samples
        for value in sample.labels.values()
    )
    for name, values in allowed.items():
        assert (
            label_values(pair.metrics, name) - {outcome.value for outcome in ShadowOutcome}
            <= values
        )


def label_values(metrics: ServerMetrics, name: str) -> set[str]:
    samples = (s for family in metrics.registry.collect() for s in family.samples)
    return {sample.labels[name] for sample in samples if name in sample.labels}
