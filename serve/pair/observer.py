"""The results of requests, for metrics: arms, divergences, judgements, shadow scoring."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from serve.pair.answers.judge import Judgement
from serve.pair.arm import ArmResult, SampleResult
from serve.pair.request import GenerationSpec


class ShadowOutcome(enum.Enum):
    """How a shadow scoring ended; the value is its label in metrics."""

    COMPARED = "compared"
    DROPPED = "dropped"
    ERROR = "error"
    DEADLINE = "deadline"


class PairObserver:
    """Told on the asyncio loop. This one ignores it all; metrics override."""

    def on_arm(self, arm: ArmResult, duration_s: float) -> None:
        """A model has drawn its samples, and the other one has scored them if it was to."""

    def on_divergences(self, samples: Sequence[SampleResult], spec: GenerationSpec) -> None:
        """Samples were scored by the other model; those without a divergence count for nothing."""

    def on_judgement(self, judgement: Judgement, task: str) -> None:
        """The answers to one prompt were judged."""

    def on_shadow(self, outcome: ShadowOutcome) -> None:
        """A shadow scoring ended."""

    def on_drain(self) -> None:
        """No new work is taken from now on."""
