"""What Prometheus sees: names, labels and units, fed by engines, the pair and the service.

Ratios are pairs of counters. Label values come from closed sets, never from a client's text. The
registry is passed in; nothing here is global.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from serve.metrics.engine_metrics import EngineMetrics
from serve.metrics.families import NATS, SHARES, MetricFamily
from serve.pair.answers.equivalence import NoResult
from serve.pair.answers.judge import Judgement
from serve.pair.arm import ArmResult, SampleResult
from serve.pair.divergence import SampleDivergence
from serve.pair.observer import PairObserver, ShadowOutcome
from serve.pair.request import GenerationSpec
from serve.pair.served import Role, ServedModel

# A closed set whose series exist from the start, so that a rate sees the first event.
REJECTION_REASONS = ("queue_full", "draining", "unauthenticated", "peer_limit")


class ServerMetrics(PairObserver):
    """All metrics of one server, on one registry. Engines report to an `observer` each."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._models: list[ServedModel] = []
        family = MetricFamily(registry)
        self._define_requests(family)
        self._define_engines(family)
        self._define_tokens(family)
        self._define_models(family)
        self._define_divergences(family)
        self._define_answers(family)

    def _define_requests(self, family: MetricFamily) -> None:
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
            "shadow_total", "Shadow scorings by how they ended.", "outcome"
        )
        for outcome in ShadowOutcome:
            self.shadow.labels(outcome.value)
        self.draining = family.gauge("draining", "1 while the server takes no new work.")
        self.build_info = family.gauge("build_info", "Always 1.", "version")
        self.model_info = family.gauge(
            "model_info", "Always 1.", "role", "backend", "device", "precision", "manifest"
        )

    def _define_engines(self, family: MetricFamily) -> None:
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

    def _define_tokens(self, family: MetricFamily) -> None:
        self.prompt_tokens = family.counter("prompt_tokens_total", "Prompt tokens.", "role")
        self.cached_prompt_tokens = family.counter(
            "cached_prompt_tokens_total", "Prompt tokens that the prefix cache held.", "role"
        )
        self.generation_tokens = family.counter(
            "generation_tokens_total", "Tokens sampled.", "role"
        )
        self.wasted_tokens = family.counter(
            "wasted_tokens_total",
            "Sampled tokens of samples that did not end by themselves.",
            "role",
            "reason",
        )

    def _define_models(self, family: MetricFamily) -> None:
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
            "model_up",
            "1 while the model takes work, a remote one while it can be reached.",
            "role",
        )
        self.remote_calls = family.counter(
            "remote_calls_total", "Calls of the remote teacher by how they ended.", "rpc", "code"
        )

    def _define_divergences(self, family: MetricFamily) -> None:
        divergence_labels = ("estimator", "policy", "task")
        self.divergence_nats = family.histogram(
            "divergence_nats",
            "A sample's mean divergence from the other model, nats per token; has no sum.",
            *divergence_labels,
            buckets=NATS,
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
            "argmax_agreeing_tokens_total", "Positions with top-1 agreement.", "task"
        )
        self.compared_tokens = family.counter(
            "compared_tokens_total", "Positions compared over the full vocabulary.", "task"
        )
        self.predicted_acceptance = family.counter(
            "predicted_acceptance_sum_total", "1 - total variation, over positions.", "task"
        )

    def _define_answers(self, family: MetricFamily) -> None:
        self.consensus = family.counter(
            "consensus_total", "Pairs of votes by outcome.", "outcome", "task"
        )
        self.answers_undecided = family.counter(
            "answers_undecided_total", "Samples whose answer could not be judged.", "reason"
        )
        for reason in NoResult:
            self.answers_undecided.labels(reason.value)
        self.vote_share = family.histogram(
            "consensus_vote_share",
            "Share of the votes for the majority answer.",
            "role",
            buckets=SHARES,
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

        A remote model is described by its own server.
        """
        role, engine = model.role.value, model.engine
        self._models.append(model)
        self.model_up.labels(role).set_function(lambda: model.is_alive)
        if model.address:
            self.request_duration.labels(role)
            return
        info = engine.info
        self.model_info.labels(
            role, info.backend, info.device, info.precision, model.manifest_sha256
        ).set(1)
        self.sequences_running.labels(role).set_function(lambda: engine.load().num_running)
        self.sequences_waiting.labels(role).set_function(lambda: engine.load().num_waiting)
        self.kv_slots_used_ratio.labels(role).set_function(
            lambda: engine.load().num_running / info.max_num_seqs
        )

    def on_drain(self) -> None:
        self.draining.set(1)

    def on_shadow(self, outcome: ShadowOutcome) -> None:
        self.shadow.labels(outcome.value).inc()

    def on_arm(self, arm: ArmResult, duration_s: float) -> None:
        self.request_duration.labels(arm.role.value).observe(duration_s)

    def on_divergences(self, samples: Sequence[SampleResult], spec: GenerationSpec) -> None:
        task, is_truncated = spec.evaluation.task, spec.sampling.is_truncated
        for divergence in (s.divergence for s in samples if s.divergence is not None):
            self.divergence_truncated.labels(divergence.policy.value).inc(int(is_truncated))
            self._on_estimates(divergence, task)
            self._on_exact(divergence, task)

    def _on_estimates(self, divergence: SampleDivergence, task: str) -> None:
        summary, policy = divergence.summary, divergence.policy.value
        self.divergence_nonfinite.labels(policy).inc(summary.nonfinite_tokens)
        means = {"k1": summary.k1_mean, "k2": summary.k2_mean, "k3": summary.k3_mean}
        for estimator, mean in means.items():
            if mean is not None:
                self.divergence_nats.labels(estimator, policy, task).observe(mean)
        labels = ("k3", policy, task)
        self.divergence_sum.labels(*labels).inc(summary.k3_sum)
        self.divergence_tokens.labels(*labels).inc(summary.num_finite_tokens)

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

    def on_judgement(self, judgement: Judgement, task: str) -> None:
        """Count votes, pass@k and what is undecided; models without a vote are left out."""
        for reason, count in judgement.undecided.items():
            self.answers_undecided.labels(reason.value).inc(count)
        if judgement.outcome is not None:
            self.consensus.labels(judgement.outcome.value, task).inc()
        for role, vote in judgement.votes.items():
            if vote.share is not None:
                self.vote_share.labels(role.value).observe(vote.share)
        if judgement.reference_kind is None:
            return
        for role, by_k in judgement.pass_at_k.items():
            for k, value in by_k.items():
                labels = (role.value, str(k), judgement.reference_kind.value, task)
                self.pass_at_k_sum.labels(*labels).inc(value)
                self.pass_at_k_prompts.labels(*labels).inc()
