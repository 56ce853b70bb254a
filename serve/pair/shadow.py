"""Shadow scoring: the other model scores samples that were returned already.

The result goes to the metrics alone. Shadow scoring neither delays nor fails the answer, and
foreground work of the other model waits for one shadow at most: they run one at a time per model,
and those beyond the bound are dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from serve.errors import DeadlineError, EngineStoppedError, QueueFullError
from serve.pair.arm import ArmJob, SampleResult, score_samples
from serve.pair.observer import PairObserver, ShadowOutcome
from serve.pair.served import Role, ServedModel

logger = logging.getLogger(__name__)


class Shadows:
    """Scores samples in the background; lives on one asyncio loop.

    At most `max_pending` wait or run; each has `timeout_s` from its offer on.
    """

    def __init__(self, observer: PairObserver, max_pending: int, timeout_s: float) -> None:
        self._observer = observer
        self._max_pending = max_pending
        self._timeout_s = timeout_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns = {role: asyncio.Lock() for role in Role}

    @property
    def num_pending(self) -> int:
        return len(self._tasks)

    def offer(self, job: ArmJob, reference: ServedModel, samples: Sequence[SampleResult]) -> None:
        """Have `reference` score copies of the samples, or drop and count them."""
        if len(self._tasks) >= self._max_pending:
            self._observer.on_shadow(ShadowOutcome.DROPPED)
            return
        # Exact divergences would need a pass of the model that answers.
        spec = replace(job.spec, divergence=replace(job.spec.divergence, exact=False))
        deadline_s = time.monotonic() + self._timeout_s
        job = replace(job, key=f"{job.key} shadow", spec=spec, deadline_s=deadline_s)
        copies = [replace(sample) for sample in samples]
        task = asyncio.create_task(self._run(job, reference, copies))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Drop what waits or runs."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, job: ArmJob, reference: ServedModel, samples: list[SampleResult]) -> None:
        outcome = ShadowOutcome.DROPPED
        try:
            outcome = await self._score(job, reference, samples)
        finally:
            self._observer.on_shadow(outcome)

    async def _score(
        self, job: ArmJob, reference: ServedModel, samples: list[SampleResult]
    ) -> ShadowOutcome:
        """Return the outcome; the divergences are counted."""
        try:
            async with asyncio.timeout(self._timeout_s), self._turns[reference.role]:
                await score_samples(job, reference, samples)
        except (QueueFullError, EngineStoppedError):
            return ShadowOutcome.DROPPED
        except (DeadlineError, TimeoutError):
            return ShadowOutcome.DEADLINE
        except Exception:
            # No client waits for a shadow: the log alone can show its failure.
            logger.exception("a shadow of the %s failed", reference.role.value)
            return ShadowOutcome.ERROR
        self._observer.on_divergences(samples, job.spec)
        if any(sample.divergence_error for sample in samples):
            return ShadowOutcome.ERROR
        return ShadowOutcome.COMPARED
