"""What an engine tells about itself while it works, and how often it counts what."""

from __future__ import annotations

from serve.engine.sequence import FinishReason, PassResult, Sequence, SequenceGroup, Work

_COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)


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


class StepStats:
    """Says what an observer is told of: of scoring, which generates nothing, only its steps."""

    def __init__(self, observer: EngineObserver) -> None:
        self.observer = observer

    def on_step(self, work: Work, result: PassResult, now_s: float) -> None:
        """Count a step in which the model ran."""
        if result.num_rows:
            step_s = now_s - work.started_s
            self.observer.on_step(work.phase, result.num_rows, step_s, step_s - result.model_s)

    def on_prompt(self, group: SequenceGroup) -> None:
        """Count a request's prompt once, however often it is prefilled."""
        if not group.is_prompt_counted and not group.is_scoring:
            group.is_prompt_counted = True
            self.observer.on_prompt(len(group.prompt.token_ids), group.num_cached_tokens)

    def on_tokens(
        self, sequences: tuple[Sequence, ...], is_drawn: list[bool], now_s: float
    ) -> None:
        """Count the tokens that are being emitted at `now_s`, of the sequences that drew one."""
        num_tokens = 0
        intervals: dict[float, int] = {}
        for sequence, has_token in zip(sequences, is_drawn, strict=True):
            group = sequence.group
            if not has_token or group.is_scoring:
                continue
            num_tokens += 1
            if sequence.token_ids:
                itl_s = now_s - sequence.last_token_s
                intervals[itl_s] = intervals.get(itl_s, 0) + 1
            if not group.has_token:
                group.has_token = True
                arrival_s = group.arrival_s
                self.observer.on_first_token(now_s - arrival_s, sequence.started_s - arrival_s)
        self.observer.on_tokens(num_tokens)
        for itl_s, count in intervals.items():
            self.observer.on_token_interval(itl_s, count)

    def on_finished(self, sequence: Sequence, reason: FinishReason) -> None:
        """Count a sample's end, and its tokens where they were for nothing."""
        if sequence.group.is_scoring:
            return
        self.observer.on_finished(reason)
        if reason not in _COMPLETE:
            self.observer.on_wasted(reason, len(sequence.token_ids))
