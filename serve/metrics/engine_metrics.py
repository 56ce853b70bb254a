"""What one engine reports, in the metrics of its server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve.engine.sequence import FinishReason
from serve.engine.stats import EngineObserver
from serve.pair.served import Role

if TYPE_CHECKING:
    from serve.metrics.server_metrics import ServerMetrics

WASTE_REASONS = (
    FinishReason.CANCELLED,
    FinishReason.DEADLINE,
    FinishReason.ERROR,
    FinishReason.SHUTDOWN,
)


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
