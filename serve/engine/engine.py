"""The thread-safe face of one model: `submit`, `score`, `cancel`, `load`, and its thread.

Commands cross to that thread through an inbox and take effect between two passes of
`serve.engine.core`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from serve.engine.core import FAILED, MAX_FAILED_STEPS, EngineCore
from serve.engine.mail import Inbox, Outbox
from serve.engine.prefix_cache import PrefixCache
from serve.engine.rows import RowLimits, Rows
from serve.engine.runner import ModelRunner
from serve.engine.scheduler import Scheduler
from serve.engine.scoring import (
    ForcedScores,
    ScoredCompletion,
    ScoringJob,
    ScoringRequest,
    forced_request,
)
from serve.engine.sequence import (
    EventSink,
    FinishReason,
    GenerationRequest,
    make_group,
    make_sequences,
)
from serve.engine.stats import EngineObserver, StepStats
from serve.engine.turns import StepArbiter
from serve.engine.watchdog import AbandonedError, Watchdog
from serve.errors import EngineFailedError
from serve.models.backend import Backend
from serve.sampling.sampler import Sampler

logger = logging.getLogger(__name__)

# Tokens of one prefill or scoring pass, padding included. The running sequences, and the other
# model on a shared device, wait for it; on the CPU smaller passes take no longer in sum.
MAX_PASS_TOKENS = {"cpu": 128, "cuda": 2048}
# How many times that when nobody waits: sequences that start together end together.
LONE_PASS_FACTOR = 8
MAX_PREFIX_CACHE_BYTES = 256 << 20
MAX_STEP_S = 120.0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is: samples that run or prefill; queued samples and scoring requests.

    `num_unaccounted` are those that entered and neither ended nor are anywhere: 0 unless there is
    a bug. It is as of the end of the last step.
    """

    num_running: int
    num_waiting: int
    max_num_seqs: int
    is_alive: bool
    num_unaccounted: int


class Engine:
    """Serves one model.

    `max_pass_tokens` bounds a prefill or scoring pass (None: by the device); prompts that come
    again are copied from `max_prefix_cache_bytes` of earlier ones (0: never).

    `priority` orders engines that share an arbiter: lower goes first. `scores_in_one_pass` False
    scores by forced decoding (`serve.engine.scoring` says when). `num_torch_threads` is for the
    engine's own thread: OpenMP pools that exceed the cores together stop spinning and lose half the
    speed. On CUDA that thread works on `stream`.

    A pass that runs out of memory twice (see `ModelRunner`) ends the one request that it was for; a
    decode step, the youngest. A step that fails otherwise ends everything in flight, and
    `MAX_FAILED_STEPS` in a row end the engine. One that takes longer than `max_step_s` ends it too,
    if somebody calls `watch`. It stays so: a new process is the way back
    (docs/decisions/009-engine-failures.md).
    """

    def __init__(
        self,
        backend: Backend,
        *,
        eos_token_ids: frozenset[int],
        max_waiting: int = 1024,
        name: str = "engine",
        observer: EngineObserver | None = None,
        arbiter: StepArbiter | None = None,
        priority: int = 0,
        scores_in_one_pass: bool = True,
        num_torch_threads: int | None = None,
        max_pass_tokens: int | None = None,
        max_num_seqs_per_client: int | None = None,
        max_prefix_cache_bytes: int = MAX_PREFIX_CACHE_BYTES,
        stream: torch.cuda.Stream | None = None,
        max_step_s: float = MAX_STEP_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.info = backend.info
        self.name = name
        self.clock = clock
        self.scores_in_one_pass = scores_in_one_pass
        self.num_torch_threads = num_torch_threads
        self.watchdog = Watchdog(max_step_s, arbiter, priority)
        self._inbox = Inbox(name, backend.info.max_num_seqs, max_waiting)
        max_pass_tokens = max_pass_tokens or MAX_PASS_TOKENS[torch.device(self.info.device).type]
        runner = ModelRunner(
            backend,
            Sampler(eos_token_ids),
            PrefixCache(backend, max_prefix_cache_bytes),
            self.watchdog,
            max_pass_tokens=max_pass_tokens,
            name=name,
            clock=clock,
        )
        lone_pass_tokens = max_pass_tokens * (LONE_PASS_FACTOR if priority == 0 else 1)
        limits = RowLimits(
            self.info.max_num_seqs, max_pass_tokens, lone_pass_tokens, max_num_seqs_per_client
        )
        outbox, stats = Outbox(), StepStats(observer or EngineObserver())
        scheduler = Scheduler(
            Rows(limits, runner.count_cached), eos_token_ids, outbox, stats, clock
        )
        self.core = EngineCore(self._inbox, outbox, scheduler, runner, stats)
        self._stream = stream
        self._is_prepared = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    # -- the thread-safe surface ------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's thread, and return when it is prepared for work."""
        self._thread.start()
        self._is_prepared.wait()

    def stop(self, timeout_s: float | None = None) -> None:
        """End everything with SHUTDOWN and wait for the thread; a stopped engine stays stopped.

        A step that takes longer than `timeout_s` (None: `max_step_s`) is given up.
        """
        self._inbox.close()
        if self._thread.ident is None:
            self._end(FinishReason.SHUTDOWN, "")
            return
        timeout_s = self.watchdog.max_step_s if timeout_s is None else timeout_s
        self._thread.join(0 if self.watchdog.is_abandoned else timeout_s)
        if self._thread.is_alive():
            self._abandon(FinishReason.SHUTDOWN, "")

    def watch(self) -> None:
        """End an engine that hangs in a step; to be called several times a second."""
        if not self._inbox.is_closed and self.watchdog.look():
            logger.error(
                "the %s engine hangs: a step takes longer than %g s",
                *(self.name, self.watchdog.max_step_s),
            )
            self._abandon(FinishReason.ERROR, "the engine hangs; see the server's log")

    def submit(self, request: GenerationRequest, sink: EventSink) -> None:
        """Queue a request; `sink` gets its events. Raises QueueFullError, EngineStoppedError."""
        group = make_group(request, sink, self.clock())
        # Here: a stop check that cannot be made is the caller's error, not the engine's.
        sequences = list(make_sequences(group))
        num_samples = request.sampling.num_samples
        self._inbox.take(num_samples, lambda: self.core.scheduler.add(group, sequences))

    def check_room(self, num_samples: int) -> None:
        """Raise as `submit` would now: cheaper, but no promise."""
        self._inbox.check_room(num_samples)

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a request's unfinished sequences before the next pass; unknown ids are ignored."""
        self._inbox.tell(lambda: self.core.scheduler.end_request(request_id, reason))

    def score(self, request: ScoringRequest) -> Future[list[ScoredCompletion]]:
        """Queue completions for teacher-forced scoring. Raises like `submit`.

        EngineFailedError for a token that the model does not have, as a larger vocabulary of the
        other model may: a lookup would fail the step, and on CUDA the device, for everyone.

        The future fails with TimeoutError past the deadline, with CancelledError after `cancel`
        (its own `cancel` does nothing), with EngineStoppedError when the engine stops or fails.
        """
        self._check_vocabulary(request)
        if not self.scores_in_one_pass:
            scores = ForcedScores(len(request.completions))
            self.submit(forced_request(request), scores.sink)
            return scores.future
        job = ScoringJob(request)
        self._inbox.take(1, lambda: self.core.scheduler.add_scoring(job))
        return job.future

    def _check_vocabulary(self, request: ScoringRequest) -> None:
        largest = max(max(token_ids) for token_ids in request.completions)
        if largest >= self.info.vocab_size:
            raise EngineFailedError(
                f"the {self.name} has no token {largest}: its vocabulary has {self.info.vocab_size}"
            )

    def load(self) -> EngineLoad:
        num_running = self.core.scheduler.rows.num_active
        return EngineLoad(
            num_running,
            max(self._inbox.num_admitted - num_running, 0),
            self.info.max_num_seqs,
            self._thread.is_alive() and not self._inbox.is_closed,
            self.core.num_unaccounted,
        )

    # -- the thread -------------------------------------------------------------------------

    def _loop(self) -> None:
        torch.set_grad_enabled(False)
        if self.num_torch_threads is not None:
            torch.get_num_threads()  # initialises this thread's own count, which is set next
            torch.set_num_threads(self.num_torch_threads)
        reason, error = FinishReason.ERROR, "the engine died; see the server's log"
        try:
            with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                self.core.runner.backend.prepare()
                self._is_prepared.set()
                while not self._inbox.is_closed:
                    self._wait_for_work()
                    self.step()
            reason, error = FinishReason.SHUTDOWN, ""
        except AbandonedError:
            logger.warning("a step of the %s engine, which was given up, has ended", self.name)
        finally:
            self._end(reason, error)
            self._is_prepared.set()

    def _wait_for_work(self) -> None:
        """Sleep while there is nothing to do; between steps, keep the claim on the cores."""
        if not self.core.scheduler.has_work and not self._inbox.is_closed:
            with self.watchdog.idle():
                self._inbox.wait()

    def step(self) -> None:
        """Work one step on the calling thread; one that fails ends everything in flight."""
        try:
            self.core.step()
        except AbandonedError:
            raise
        except Exception:
            logger.exception("the %s engine failed in a step", self.name)
            self._recover()

    def _recover(self) -> None:
        with self.watchdog.owned():
            may_go_on = self.core.recover()
        if not may_go_on:
            logger.error(
                "the %s engine ends: %d steps in a row failed", self.name, MAX_FAILED_STEPS
            )
            self._end(FinishReason.ERROR, FAILED)

    def _end(self, reason: FinishReason, error: str) -> None:
        """Take no more work, and end what was taken, unless another thread has done so."""
        self.watchdog.leave()
        self._inbox.close()
        with self.watchdog.owned():
            if not self.watchdog.is_abandoned:
                self._end_all(reason, error)

    def _abandon(self, reason: FinishReason, error: str) -> None:
        """Do as `_end`, on another thread than the engine's, which hangs."""
        self._inbox.close()
        self.watchdog.abandon(lambda: self._end_all(reason, error))

    def _end_all(self, reason: FinishReason, error: str) -> None:
        self._inbox.run()
        self.core.end_all(reason, error)
