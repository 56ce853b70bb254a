"""How metrics are made: the prefix of their names, buckets, and what is left out of the text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_PREFIX = "tandem"
# 0.5 ms (a small student decodes a token in a few) to 10 min.
SECONDS = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2,
    0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
NATS = (-2.0, -1.0, -0.5, -0.2, -0.1, 0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


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


class MetricFamily:
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
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS
    ) -> Histogram:
        metric: Histogram = self._register(
            Histogram(f"{_PREFIX}_{name}", text, labels, buckets=buckets, registry=None)
        )
        return metric
