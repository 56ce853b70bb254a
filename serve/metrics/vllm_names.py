"""Our metrics once more under vLLM's names, for dashboards and autoscalers that know those.

Names of vLLM 0.32 (its page "Production Metrics"), plus two that it renamed and that are still in
use: `gpu_cache_usage_perc` (now `kv_cache_usage_perc`) and `time_per_output_token_seconds` (now
`inter_token_latency_seconds`). Nothing is counted twice: values are read at every scrape. What
differs: a vLLM request is one of our samples, but for the times until the first token and in the
queue, which are those of whole requests; `model_name` is the role, the buckets are ours, and the
latency of a request includes its scoring by the other model.

`promtool check metrics` objects to the colons by design, which it reserves for recording rules: the
aliases are outside the promise that it is content.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from serve.engine.sequence import FinishReason
from serve.metrics.server_metrics import ServerMetrics

# How vLLM names why a request finished.
_FINISHED_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.DEADLINE: "abort",
    FinishReason.SHUTDOWN: "abort",
    FinishReason.ERROR: "error",
}


def register_vllm_aliases(metrics: ServerMetrics) -> None:
    """Add the aliases to the registry of `metrics`; ValueError when they are there already."""
    metrics.registry.register(_Aliases(metrics))


@dataclass(frozen=True, slots=True)
class _Alias:
    """A metric of ours labelled by role alone, and its name at vLLM (a counter's: no `_total`)."""

    name: str
    source: Counter | Gauge | Histogram

    def collect(self) -> Metric:
        (family,) = self.source.collect()
        alias = Metric(f"vllm:{self.name}", family.documentation, family.type)
        for sample in _uncreated(family):
            labels = dict(sample.labels)
            name = alias.name + sample.name.removeprefix(family.name)
            alias.add_sample(name, {"model_name": labels.pop("role"), **labels}, sample.value)
        return alias


class _Aliases(Collector):
    def __init__(self, metrics: ServerMetrics) -> None:
        self._samples = metrics.samples
        self._aliases = [
            _Alias("num_requests_running", metrics.sequences_running),
            _Alias("num_requests_waiting", metrics.sequences_waiting),
            _Alias("kv_cache_usage_perc", metrics.kv_slots_used_ratio),
            _Alias("gpu_cache_usage_perc", metrics.kv_slots_used_ratio),
            _Alias("time_to_first_token_seconds", metrics.time_to_first_token),
            _Alias("inter_token_latency_seconds", metrics.inter_token_latency),
            _Alias("time_per_output_token_seconds", metrics.inter_token_latency),
            _Alias("e2e_request_latency_seconds", metrics.request_duration),
            _Alias("request_queue_time_seconds", metrics.request_queue),
            _Alias("prompt_tokens", metrics.prompt_tokens),
            _Alias("generation_tokens", metrics.generation_tokens),
        ]

    def describe(self) -> Iterable[Metric]:
        """Claim the names, so that a second registration fails."""
        return self.collect()

    def collect(self) -> Iterable[Metric]:
        yield from (alias.collect() for alias in self._aliases)
        yield self._successes()

    def _successes(self) -> Metric:
        """vLLM calls every ending a success, and counts three of ours as one."""
        counts: dict[tuple[str, str], float] = {}
        (family,) = self._samples.collect()
        for sample in _uncreated(family):
            reason = _FINISHED_REASONS[FinishReason(sample.labels["finish_reason"])]
            key = sample.labels["role"], reason
            counts[key] = counts.get(key, 0.0) + sample.value
        successes = CounterMetricFamily(
            "vllm:request_success", family.documentation, labels=("model_name", "finished_reason")
        )
        for key, count in counts.items():
            successes.add_metric(key, count)
        return successes


def _uncreated(family: Metric) -> Iterable[Sample]:
    return (sample for sample in family.samples if not sample.name.endswith("_created"))
