"""What Prometheus sees: names, labels and units of `design/api.md`, fed by engines and service.

Ratios are pairs of counters. Label values come from closed sets, never from a client's text. The
registry is passed in; nothing here is global.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.engine.sequence import FinishReason
from serve.engine.stats import EngineObserver
from serve.pair.answers.equivalence import NoResult
from serve.pair.answers.judge import Agreement
from serve.pair.arm import SampleResult
from serve.pair.divergence import SampleDivergence
from serve.pair.served import Role, ServedModel

_PREFIX = "tandem"
# 0.5 ms (a small student decodes a token in a few) to 10 min.
_SECONDS = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2,
    0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
_NATS = (-2.0, -1.0, -0.5, -0.2, -0.1, 0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)

# Closed sets whose series exist from the start, so that a rate sees the first event.
SHADOW_OUTCOMES = ("compared", "dropped", "error", "deadline")
REJECTION_REASONS = ("queue_full", "draining", "unauthenticated", "peer_limit")
WASTE_REASONS = (
    FinishReason.CANCELLED,
    FinishReason.DEADLINE,
    FinishReason.ERROR,
    FinishReason.SHUTDOWN,
)


class _Uncreated(Collector):
    """A registry's view of a metric: without its `_created` series, and claiming no names.

    The contract has both a histogram `divergence_nats` and a counter `divergence_nats_sum_total`.
    In the text format their series differ; prometheus_client's registry takes them for a clash.
    """

    def __init__(self, metric: Collector) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        for family in self._metric.collect():
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
            yield family


class _Family:
    """Makes metrics with the common prefix and registers them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def _register(self, metric: Any) -> Any:
        self._registry.register(_Uncreated(metric))
        return metric

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        metric: Counter = self._register(Counter(f"{_PREFIX}_{name}", text, labels, registry=None))
        return metric

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        metric: Gauge = self._register(Gauge(f"{_PREFIX}_{name}", text, labels, registry=None))
        return metric

    def histogram(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS
    ) -> Histogram:
        metric: Histogram = self._register(
            Histogram(f"{_PREFIX}_{name}", text, labels, buckets=buckets, registry=None)
        )
        return metric


class EngineMetrics(EngineObserver):
    """What one engine reports; called on its thread."""

    def __init__(self, metrics: ServerMetrics, role: Role) -> None:
        label = role.value
        self._steps = {
            phase: metrics.engine_step.labels(label, phase)
            for phase in ("prefill", "decode", "score")
        }
        self._finished = {
            reason: metrics.samples.labels(label, reason.value) for reason in FinishReason
        }
        self._wasted = {
            reason: metrics.wasted_tokens.labels(label, reason.value) for reason in WASTE_REASONS
        }
        self._host = metrics.engine_host.labels(label)
        self._batch_size = metrics.batch_size.labels(label)
        self._ttft = metrics.time_to_first_token.labels(label)
        self._queue = metrics.request_queue.labels(label)
        self._itl = metrics.inter_token_latency.labels(label)
        self._prompt_tokens = metrics.prompt_tokens.labels(label)
        self._cached_prompt_tokens = metrics.cached_prompt_tokens.labels(label)
        self._generation_tokens = metrics.generation_tokens.labels(label)

    def on_step(self, phase: str, batch_size: int, step_s: float, host_s: float) -> None:
        self._steps[phase].observe(step_s)
        self._host.observe(host_s)
        self._batch_size.set(batch_size)

    def on_first_token(self, ttft_s: float, queue_s: float) -> None:
        self._ttft.observe(ttft_s)
        self._queue.observe(queue_s)

    def on_token_interval(self, itl_s: float, count: int) -> None:
        for _ in range(count):
            self._itl.observe(itl_s)

    def on_prompt(self, num_tokens: int, num_cached: int) -> None:
        self._prompt_tokens.inc(num_tokens)
        self._cached_prompt_tokens.inc(num_cached)

    def on_tokens(self, num_tokens: int) -> None:
        self._generation_tokens.inc(num_tokens)

    def on_finished(self, finish_reason: FinishReason) -> None:
        self._finished[finish_reason].inc()

    def on_wasted(self, finish_reason: FinishReason, num_tokens: int) -> None:
        self._wasted[finish_reason].inc(num_tokens)


class ServerMetrics:
    """All metrics of one server, on one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._models: list[ServedModel] = []
        family = _Family(registry)
        self._define_requests(family)
        self._define_engines(family)
        self._define_quality(family)

    def _define_requests(self, family: _Family) -> None:
        self.requests = family.counter(
            "requests_total", "Calls by how they ended.", "rpc", "route", "code", "task"
        )
        self.request_duration = family.histogram(
            "request_duration_seconds", "From arrival to a model's last scored sample.", "role"
        )
        self.admission_rejections = family.counter(
            "admission_rejections_total", "Calls refused although valid.", "reason"
        )
        for reason in REJECTION_REASONS:
            self.admission_rejections.labels(reason)
        self.shadow = family.counter(
            "shadow_total", "Comparisons behind an answer, by how they ended.", "outcome"
        )
        for outcome in SHADOW_OUTCOMES:
            self.shadow.labels(outcome)
        self.draining = family.gauge("draining", "1 while the server takes no new work.")
        self.build_info = family.gauge("build_info", "Always 1.", "version")
        self.model_info = family.gauge(
            "model_info", "Always 1.", "role", "backend", "device", "precision", "manifest"
        )

    def _define_engines(self, family: _Family) -> None:
        self.samples = family.counter(
            "samples_total", "Samples by how they ended.", "role", "finish_reason"
        )
        self.request_queue = family.histogram(
            "request_queue_seconds", "From a request's arrival to its first prefill.", "role"
        )
        self.time_to_first_token = family.histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to the first token of any of its samples.",
            "role",
        )
        self.inter_token_latency = family.histogram(
            "inter_token_latency_seconds", "Between two tokens of one sample.", "role"
        )
        self.engine_step = family.histogram(
            "engine_step_seconds", "One prefill, decode or score step.", "role", "phase"
        )
        self.engine_host = family.histogram(
            "engine_host_seconds", "The part of a step that is not the model.", "role"
        )
        self.prompt_tokens = family.counter("prompt_tokens_total", "Prompt tokens.", "role")
        self.cached_prompt_tokens = family.counter(
            "cached_prompt_tokens_total", "Those of them that were cached.", "role"
        )
        self.generation_tokens = family.counter(
            "generation_tokens_total", "Tokens sampled.", "role"
        )
        self.wasted_tokens = family.counter(
            "wasted_tokens_total",
            "Those of them whose sample was not to end by itself.",
            "role",
            "reason",
        )
        self.batch_size = family.gauge("batch_size", "Sequences in the last step.", "role")
        self.sequences_running = family.gauge("sequences_running", "Samples with a slot.", "role")
        self.sequences_waiting = family.gauge("sequences_waiting", "Queued work.", "role")
        self.kv_slots_used_ratio = family.gauge(
            "kv_slots_used_ratio", "Slots of the KV cache in use, 0 to 1.", "role"
        )

        self.ledger_imbalance = family.gauge(
            "ledger_imbalance", "Work that engines took and cannot account for; not 0: a bug."
        )
        self.ledger_imbalance.set_function(
            lambda: sum(model.engine.load().num_unaccounted for model in self._models)
        )
        self.model_up = family.gauge(
            "model_up", "1 while the model takes work; elsewhere: while it can be reached.", "role"
        )
        self.remote_calls = family.counter(
            "remote_calls_total", "Calls of a teacher elsewhere, by how they ended.", "rpc", "code"
        )

    def _define_quality(self, family: _Family) -> None:
        divergence_labels = ("estimator", "policy", "task")
        self.divergence_nats = family.histogram(
            "divergence_nats",
            "A sample's mean divergence from the other model, nats per token; has no sum.",
            *divergence_labels,
            buckets=_NATS,
        )
        self.divergence_sum = family.counter(
            "divergence_nats_sum_total", "Divergence summed over tokens, nats.", *divergence_labels
        )
        self.divergence_tokens = family.counter(
            "divergence_tokens_total", "Tokens in divergence_nats_sum_total.", *divergence_labels
        )
        self.divergence_nonfinite = family.counter(
            "divergence_nonfinite_tokens_total", "Tokens without a finite estimate.", "policy"
        )
        self.divergence_truncated = family.counter(
            "divergence_truncated_samples_total", "Samples whose k1..k3 are biased.", "policy"
        )
        self.argmax_agreeing = family.counter(
            "argmax_agreeing_tokens_total", "Positions whose likeliest token is the same.", "task"
        )
        self.compared_tokens = family.counter(
            "compared_tokens_total", "Positions compared over the full vocabulary.", "task"
        )
        self.predicted_acceptance = family.counter(
            "predicted_acceptance_sum_total", "1 - total variation, over positions.", "task"
        )
        self.consensus = family.counter(
            "consensus_total", "Pairs of votes by outcome.", "outcome", "task"
        )
        self.answers_undecided = family.counter(
            "answers_undecided_total", "Samples whose answer could not be judged.", "reason"
        )
        for reason in NoResult:
            self.answers_undecided.labels(reason.value)
        self.vote_share = family.histogram(
            "consensus_vote_share", "The winner's part of the votes.", "role", buckets=_SHARES
        )
        pass_at_k_labels = ("role", "k", "reference", "task")
        self.pass_at_k_sum = family.counter(
            "pass_at_k_sum_total", "pass@k summed over prompts.", *pass_at_k_labels
        )
        self.pass_at_k_prompts = family.counter(
            "pass_at_k_prompts_total", "Prompts in pass_at_k_sum_total.", *pass_at_k_labels
        )

    def observer(self, role: Role) -> EngineMetrics:
        """Return what an engine of this role reports to."""
        self.request_duration.labels(role.value)
        return EngineMetrics(self, role)

    def watch(self, model: ServedModel) -> None:
        """Describe a model, and read its engine's load at every scrape.

        A model elsewhere is described by the server that has it.
        """
        role, engine = model.role.value, model.engine
        self._models.append(model)
        self.model_up.labels(role).set_function(_reader(model, "is_alive"))
        if model.address:
            self.request_duration.labels(role)
            return
        info = engine.info
        self.model_info.labels(
            role, info.backend, info.device, info.precision, model.manifest_sha256
        ).set(1)
        self.sequences_running.labels(role).set_function(_reader(model, "num_running"))
        self.sequences_waiting.labels(role).set_function(_reader(model, "num_waiting"))
        self.kv_slots_used_ratio.labels(role).set_function(
            lambda: engine.load().num_running / info.max_num_seqs
        )

    def on_divergence(self, sample: SampleResult, task: str, *, is_truncated: bool) -> None:
        """Count a sample's divergence; a sample without one changes nothing."""
        divergence = sample.divergence
        if divergence is None:
            return
        summary, policy = divergence.summary, divergence.policy.value
        self.divergence_nonfinite.labels(policy).inc(summary.nonfinite_tokens)
        self.divergence_truncated.labels(policy).inc(int(is_truncated))
        means = {"k1": summary.k1_mean, "k2": summary.k2_mean, "k3": summary.k3_mean}
        for estimator, mean in means.items():
            if mean is not None:
                self.divergence_nats.labels(estimator, policy, task).observe(mean)
        labels = ("k3", policy, task)
        self.divergence_sum.labels(*labels).inc(summary.k3_sum)
        self.divergence_tokens.labels(*labels).inc(summary.num_finite_tokens)
        self._on_exact(divergence, task)

    def _on_exact(self, divergence: SampleDivergence, task: str) -> None:
        exact, num_tokens = divergence.exact, divergence.summary.num_tokens
        if exact is None:
            return
        self.compared_tokens.labels(task).inc(num_tokens)
        self.argmax_agreeing.labels(task).inc(exact.argmax_agreement * num_tokens)
        self.predicted_acceptance.labels(task).inc(exact.predicted_acceptance * num_tokens)
        labels = ("exact", divergence.policy.value, task)
        self.divergence_nats.labels(*labels).observe(exact.kl_mean)
        if math.isfinite(exact.kl_mean):
            self.divergence_sum.labels(*labels).inc(exact.kl_mean * num_tokens)
            self.divergence_tokens.labels(*labels).inc(num_tokens)

    def on_agreement(self, agreement: Agreement, task: str) -> None:
        """Count votes, pass@k and what is undecided; models without a vote are left out."""
        for reason, count in agreement.undecided.items():
            self.answers_undecided.labels(reason.value).inc(count)
        if agreement.outcome is not None:
            self.consensus.labels(agreement.outcome.value, task).inc()
        for role, vote in agreement.votes.items():
            if vote.share is not None:
                self.vote_share.labels(role.value).observe(vote.share)
        if agreement.reference_kind is None:
            return
        for role, by_k in agreement.pass_at_k.items():
            for k, value in by_k.items():
                labels = (role.value, str(k), agreement.reference_kind.value, task)
                self.pass_at_k_sum.labels(*labels).inc(value)
                self.pass_at_k_prompts.labels(*labels).inc()


def _reader(model: ServedModel, name: str) -> Callable[[], float]:
    return lambda: float(getattr(model.engine.load(), name))
