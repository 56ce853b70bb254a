"""What the metrics say equals what the responses said."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections import Counter
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from protos.tandem.v1 import inference_pb2 as pb
from serve.metrics import MetricsServer, ServerMetrics
from serve.routing import Role

ROLES = {pb.ROLE_STUDENT: "student", pb.ROLE_TEACHER: "teacher"}
# design/api.md, as far as this server feeds them: (name, labels).
CONTRACT = {
    "requests_total": "rpc route code task",
    "samples_total": "role finish_reason",
    "request_duration_seconds": "role",
    "request_queue_seconds": "role",
    "time_to_first_token_seconds": "role",
    "inter_token_latency_seconds": "role",
    "engine_step_seconds": "role phase",
    "engine_host_seconds": "role",
    "prompt_tokens_total": "role",
    "cached_prompt_tokens_total": "role",
    "generation_tokens_total": "role",
    "sequences_running": "role",
    "sequences_waiting": "role",
    "batch_size": "role",
    "kv_slots_used_ratio": "role",
    "divergence_nats": "estimator policy task",
    "divergence_nats_sum_total": "estimator policy task",
    "divergence_tokens_total": "estimator policy task",
    "divergence_nonfinite_tokens_total": "policy",
    "divergence_truncated_samples_total": "policy",
    "argmax_agreeing_tokens_total": "task",
    "compared_tokens_total": "task",
    "predicted_acceptance_sum_total": "task",
    "consensus_total": "outcome task",
    "consensus_vote_share": "role",
    "pass_at_k_sum_total": "role k reference task",
    "pass_at_k_prompts_total": "role k reference task",
    "admission_rejections_total": "reason",
    "draining": "",
    "build_info": "version",
    "model_info": "role backend device precision manifest",
}


@pytest.fixture
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
    assert pair.value("time_to_first_token_seconds_count", role=label) == 12


@pytest.mark.parametrize(("role", "label"), ROLES.items())
def test_samples_by_finish_reason_equal_those_of_the_responses(
    answered: Any, role: int, label: str
) -> None:
    pair, responses = answered
    counts = Counter(sample.finish_reason for sample in samples(responses, role))
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


def test_names_types_and_labels_are_the_contract(serving: Any, make_pair: Any) -> None:
    registry = make_pair().metrics.registry
    exposed = {family.name for family in registry.collect()}
    expected = {f"tandem_{name.removesuffix('_total')}" for name in CONTRACT}
    assert exposed == expected
    metrics = {
        metric._name: metric._labelnames
        for metric in vars(ServerMetrics(CollectorRegistry())).values()
        if hasattr(metric, "_labelnames")
    }
    for name, labels in CONTRACT.items():
        assert metrics[f"tandem_{name.removesuffix('_total')}"] == tuple(labels.split())


def test_exposition_is_clean(answered: Any) -> None:
    """The rules of `promtool check metrics` that apply: help, suffixes, no doubled series."""
    pair, _ = answered
    text = exposition(pair.metrics)
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(set(names)) == len(names)
    series = re.findall(r"^(tandem_[^ ]+) ", text, re.MULTILINE)
    assert len(set(series)) == len(series)
    assert "_created" not in text
    for family in families:
        assert family.documentation
        has_total = all(s.name.endswith("_total") for s in family.samples)
        assert has_total == (family.type == "counter") or not family.samples


def exposition(metrics: ServerMetrics) -> str:
    server = MetricsServer(metrics.registry, lambda: True, "127.0.0.1", 0)
    server.start()
    try:
        with urllib.request.urlopen(server.url, timeout=10) as reply:
            assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            return str(reply.read().decode())
    finally:
        server.stop()


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


@pytest.mark.parametrize(("is_healthy", "code"), [(True, 200), (False, 503)])
def test_healthz_follows_the_server(is_healthy: bool, code: int) -> None:
    server = MetricsServer(CollectorRegistry(), lambda: is_healthy, "127.0.0.1", 0)
    server.start()
    try:
        assert status(server.url.replace("/metrics", "/healthz")) == code
        assert status(server.url.replace("/metrics", "/")) == 404
    finally:
        server.stop()


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
