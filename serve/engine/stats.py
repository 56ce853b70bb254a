"""What an engine tells about itself while it works."""

from __future__ import annotations

from serve.engine.sequence import FinishReason


class EngineObserver:
    """Told about every step, on the engine's thread. This one ignores it all; metrics override."""

    def on_step(self, phase: str, batch_size: int, step_s: float, host_s: float) -> None:
        """A pass of `phase` prefill, decode or score ended; `host_s` of it was not the model."""

    def on_first_token(self, ttft_s: float, queue_s: float) -> None:
        """A request got its first token `ttft_s` after it arrived, `queue_s` of them waiting.

        Once, however many samples it has: those that wait for a row are late by choice.
        """

    def on_token_interval(self, itl_s: float, count: int) -> None:
        """`count` samples each got a token `itl_s` after their last one."""

    def on_prompt(self, num_tokens: int, num_cached: int) -> None:
        """A request's prompt is complete; `num_cached` of its tokens came from the prefix cache."""

    def on_tokens(self, num_tokens: int) -> None:
        """So many tokens were generated."""

    def on_finished(self, finish_reason: FinishReason) -> None:
        """A sample reached its terminal state."""

    def on_wasted(self, finish_reason: FinishReason, num_tokens: int) -> None:
        """A sample ended before its end, so that `num_tokens` were generated for nothing."""
