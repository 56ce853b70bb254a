"""One thread, one model: schedule, run, sample, until every sequence has one terminal event.

The thread-safe surface is `submit`, `cancel`, `score`, `load` and `stop`; commands cross to the
engine's thread through one queue and take effect between steps.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch

from serve.engine.deadlines import Deadlines, is_past
from serve.engine.intake import Intake
from serve.engine.outbox import Outbox
from serve.engine.runner import Runner
from serve.engine.scheduler import Scheduler
from serve.engine.scoring import (
    ForcedScores,
    ScoredCompletion,
    ScoringJob,
    ScoringRequest,
    forced_request,
    scoring_error,
)
from serve.engine.scoring_queue import ScoringQueue
from serve.engine.sequence import (
    EventSink,
    FinishReason,
    GenerationRequest,
    SequenceGroup,
    TokenEvent,
    make_group,
    make_sequences,
)
from serve.engine.sequence import Sequence as Sample
from serve.engine.stats import EngineObserver
from serve.engine.turns import StepArbiter
from serve.engine.watchdog import StepWatch
from serve.errors import EngineFailedError
from serve.models.backend import Backend, is_out_of_memory
from serve.sampling.sampler import SampledBatch, Sampler

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Tokens of one prefill or scoring pass, padding included. The running sequences, and the other
# model on a shared device, wait for it; on the CPU smaller passes take no longer in sum.
MAX_PASS_TOKENS = {"cpu": 128, "cuda": 2048}
# How many times that when nobody waits: sequences that start together end together.
LONE_PASS_FACTOR = 8
MAX_PREFIX_CACHE_BYTES = 256 << 20
MAX_STEP_S = 120.0
# So many failed steps in a row end an engine: what a device has lost, no later step finds again.
MAX_FAILED_STEPS = 3
OUT_OF_MEMORY = "the model ran out of memory on this request"


class _AbandonedError(Exception):
    """A step came to its end after the engine had been ended without it."""


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

    A pass that runs out of memory twice (see `Runner`) ends the one request that it was for; a
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
        self._eos_token_ids = eos_token_ids
        self._sampler = Sampler(eos_token_ids)
        self._observer = observer or EngineObserver()
        self._arbiter = arbiter
        self._priority = priority
        self._scores_in_one_pass = scores_in_one_pass
        self._num_torch_threads = num_torch_threads
        self._stream = stream
        self._prepare = backend.prepare
        self._is_prepared = threading.Event()
        max_pass_tokens = max_pass_tokens or MAX_PASS_TOKENS[torch.device(self.info.device).type]
        self._max_pass_tokens = max_pass_tokens
        self._scheduler = Scheduler(
            backend.info.max_num_seqs, max_pass_tokens, max_num_seqs_per_client
        )
        self._runner = Runner(backend, self._scheduler, max_pass_tokens, max_prefix_cache_bytes)
        self._scoring = ScoringQueue()
        # Passes beside decode steps: one per step, of the kinds that have work in turns.
        self._passes = deque([self._score, self._admit, self._prefill_chunk])
        # A request id may name several: a generation, and the scoring of other samples.
        self._groups: defaultdict[str, list[SequenceGroup]] = defaultdict(list)
        # By `id` of the group: what ends before the next pass, for what reason and with what error.
        # A step looks at these, and at the earliest deadline, never at everything that waits.
        self._endings: dict[int, tuple[FinishReason, str]] = {}
        self._deadlines = Deadlines(self._live_ids)
        self._intake = Intake(name, backend.info.max_num_seqs, max_waiting)
        # The ledger, of the engine's thread: what its commands brought in and it has not released.
        self._num_inside = 0
        self._num_unaccounted = 0
        # Who holds it may touch what the engine works on. The engine's thread lets go of it while
        # the model runs, so that others can end an engine that hangs there.
        self._ownership = threading.Lock()
        self._is_abandoned = False
        self._max_step_s = max_step_s
        self._step_watch = StepWatch(max_step_s)
        self._step_numbers = itertools.count(1)
        self._current_step = 0  # 0 while the engine waits, for work or for its turn
        self._num_failed_steps = 0
        self._model_s = 0.0
        self._outbox = Outbox()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    # -- the thread-safe surface ------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's thread, and return when it is prepared for work."""
        self._thread.start()
        self._is_prepared.wait()

    def run(self) -> Iterator[None]:
        """Work on the calling thread until nothing is left, yielding after each step.

        Instead of `start`, for callers that have nothing else to do meanwhile.
        """
        self._intake.run()
        while self._has_work():
            self.step()
            yield

    def stop(self, timeout_s: float | None = None) -> None:
        """End everything with SHUTDOWN and wait for the thread; a stopped engine stays stopped.

        A step that takes longer than `timeout_s` (None: `max_step_s`) is given up.
        """
        self._intake.close()
        if self._thread.ident is None:
            self._end(FinishReason.SHUTDOWN, "")
            return
        timeout_s = self._max_step_s if timeout_s is None else timeout_s
        self._thread.join(0 if self._is_abandoned else timeout_s)
        if self._thread.is_alive():
            self._abandon(FinishReason.SHUTDOWN, "")

    def watch(self) -> None:
        """End an engine that hangs in a step; to be called several times a second."""
        if not self._intake.is_closed and self._step_watch.look(self._current_step):
            logger.error(
                "the %s engine hangs: a step takes longer than %g s", self.name, self._max_step_s
            )
            self._abandon(FinishReason.ERROR, "the engine hangs; see the server's log")

    def submit(self, request: GenerationRequest, sink: EventSink) -> None:
        """Queue a request; `sink` gets its events. Raises QueueFullError, EngineStoppedError."""
        group = make_group(request, sink, self.clock())
        # Here: a stop check that cannot be made is the caller's error, not the engine's.
        sequences = list(make_sequences(group))
        num_samples = request.sampling.num_samples
        self._intake.take(num_samples, lambda: self._add_group(group, sequences))

    def check_room(self, num_samples: int) -> None:
        """Raise as `submit` would now: cheaper, but no promise."""
        self._intake.check_room(num_samples)

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a request's unfinished sequences before the next step; unknown ids are ignored."""
        self._intake.tell(lambda: self._end_request(request_id, reason))

    def score(self, request: ScoringRequest) -> Future[list[ScoredCompletion]]:
        """Queue completions for teacher-forced scoring. Raises like `submit`.

        EngineFailedError for a token that the model does not have, as a larger vocabulary of the
        other model may: a lookup would fail the step, and on CUDA the device, for everyone.

        The future fails with TimeoutError past the deadline, with CancelledError after `cancel`
        (its own `cancel` does nothing), with EngineStoppedError when the engine stops or fails.
        """
        self._check_vocabulary(request)
        if not self._scores_in_one_pass:
            scores = ForcedScores(len(request.completions))
            self.submit(forced_request(request), scores.sink)
            return scores.future
        job = ScoringJob(request)
        self._intake.take(1, lambda: self._add_job(job))
        return job.future

    def _check_vocabulary(self, request: ScoringRequest) -> None:
        largest = max(max(token_ids) for token_ids in request.completions)
        if largest >= self.info.vocab_size:
            raise EngineFailedError(
                f"the {self.name} has no token {largest}: its vocabulary has {self.info.vocab_size}"
            )

    def load(self) -> EngineLoad:
        num_running = self._scheduler.num_active
        return EngineLoad(
            num_running,
            max(self._intake.num_admitted - num_running, 0),
            self.info.max_num_seqs,
            self._thread.is_alive() and not self._intake.is_closed,
            self._num_unaccounted,
        )

    # -- commands, on the engine's thread ---------------------------------------------------

    def _add_group(self, group: SequenceGroup, sequences: Sequence[Sample]) -> None:
        request = group.request
        self._num_inside += request.sampling.num_samples
        self._groups[request.request_id].append(group)
        self._scheduler.add(sequences)
        self._watch_deadline(request.request_id, request.deadline_s)

    def _add_job(self, job: ScoringJob) -> None:
        self._num_inside += 1
        self._scoring.add(job)
        self._watch_deadline(job.request.request_id, job.request.deadline_s)

    def _release(self) -> None:
        self._num_inside -= 1
        self._intake.release()

    def _watch_deadline(self, request_id: str, deadline_s: float | None) -> None:
        if deadline_s is not None:
            self._deadlines.add(deadline_s, request_id)

    def _live_ids(self) -> set[str]:
        return {*self._groups, *(job.request.request_id for job in self._scoring)}

    def _end_request(
        self, request_id: str, reason: FinishReason, expired_by_s: float | None = None
    ) -> None:
        """Mark groups for their end and fail scoring jobs: all of a request, or the expired ones.

        Keyed by request, not by group: a deadline may outlive what it was made for.
        """
        for group in self._groups.get(request_id, ()):
            if expired_by_s is None or is_past(group.request.deadline_s, expired_by_s):
                self._endings.setdefault(id(group), (reason, ""))
        for job in self._scoring.of(request_id):
            if expired_by_s is None or is_past(job.request.deadline_s, expired_by_s):
                self._scoring.remove(job)
                self._fail(job, scoring_error(reason, ""))

    def _wait_for_work(self) -> None:
        """Sleep while there is nothing to do; between steps, keep the claim on the cores."""
        if not self._has_work() and not self._intake.is_closed:
            if self._arbiter:
                self._arbiter.unclaim(self._priority)
            self._intake.wait()
            if self._arbiter:
                self._arbiter.claim(self._priority)

    def _has_work(self) -> bool:
        return bool(self._scheduler.num_active or self._scheduler.waiting or self._scoring)

    # -- the loop ---------------------------------------------------------------------------

    def _loop(self) -> None:
        torch.set_grad_enabled(False)
        if self._num_torch_threads is not None:
            torch.get_num_threads()  # initialises this thread's own count, which is set next
            torch.set_num_threads(self._num_torch_threads)
        reason, error = FinishReason.ERROR, "the engine died; see the server's log"
        try:
            with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                self._prepare()
                self._is_prepared.set()
                while not self._intake.is_closed:
                    self._wait_for_work()
                    self._try_step()
            reason, error = FinishReason.SHUTDOWN, ""
        except _AbandonedError:
            logger.warning("a step of the %s engine, which was given up, has ended", self.name)
        finally:
            self._end(reason, error)
            self._is_prepared.set()

    def _try_step(self) -> None:
        try:
            self.step()
        except _AbandonedError:
            raise
        except Exception:
            logger.exception("the %s engine failed in a step", self.name)
            self._recover()

    def _recover(self) -> None:
        """After a failed step end everything in flight; new work may succeed."""
        self._num_failed_steps += 1
        self._runner.distrust_rows()
        text = "the engine failed; see the server's log"
        if self._num_failed_steps < MAX_FAILED_STEPS:
            with self._ownership:
                self._end_all(FinishReason.ERROR, text)
        else:
            logger.error(
                "the %s engine ends: %d steps in a row failed", self.name, MAX_FAILED_STEPS
            )
            self._end(FinishReason.ERROR, text)

    def _end(self, reason: FinishReason, error: str) -> None:
        """Take no more work, and end what was taken, unless another thread has done so."""
        if self._arbiter:
            self._arbiter.unclaim(self._priority)
        self._intake.close()
        with self._ownership:
            if not self._is_abandoned:
                self._intake.run()
                self._end_all(reason, error)

    def _abandon(self, reason: FinishReason, error: str) -> None:
        """Do as `_end`, on another thread than the engine's, which hangs.

        Where it hangs in what is not the model, its requests wait for it: it may be about to
        change what they are made of.
        """
        self._intake.close()
        if self._arbiter:
            self._arbiter.drop(self._priority)
        if self._ownership.acquire(blocking=False):
            self._is_abandoned = True
            try:
                self._intake.run()
                self._end_all(reason, error)
            finally:
                self._ownership.release()

    def step(self) -> None:
        """Run commands, end what is over, decode, then run one prefill or scoring pass.

        The tokens of the decode step are on their way before the pass begins.
        """
        with self._ownership:
            self._current_step = next(self._step_numbers)
            try:
                self._step()
            finally:
                self._current_step = 0

    def _step(self) -> None:
        self._intake.run()
        self._end_cancelled_and_expired()
        if self._scheduler.running:
            self._decode()
            self._outbox.flush()
            # Before the pass: who came during the decode step need not wait for another one, and
            # what expired in it must not reach the model.
            self._intake.run()
            self._end_cancelled_and_expired()
        # One more than there are kinds: admission may have given the kind behind it work.
        for _ in range(len(self._passes) + 1):
            self._passes.rotate(-1)
            if self._passes[-1]():
                break
        self._balance()
        self._outbox.flush()
        if not self._has_work():
            self._sampler.forget()

    def _decode(self) -> None:
        started_s = self.clock()
        running = list(self._scheduler.running)
        logits = self._attempt(self._runner.decode)
        if logits is None:
            self._give_up(_expendable(running))
            self._scheduler.admit_no_more()  # or the next ones would end others in turn
            return
        if self._accept(running, logits):
            self._num_failed_steps = 0
            self._scheduler.note_decoded()
        self._finish_step("decode", len(logits), started_s)

    def _attempt(self, run: Callable[[], T]) -> T | None:
        """Return what the model does; None when it is out of memory."""
        try:
            with self._model():
                return run()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.exception("the %s engine is out of memory", self.name)
            return None

    def _give_up(self, groups: Iterable[SequenceGroup]) -> None:
        """End requests that there is no memory for."""
        for group in groups:
            self._endings[id(group)] = FinishReason.ERROR, OUT_OF_MEMORY
        self._end_marked()

    def _admit(self) -> bool:
        """Let waiting sequences in; True when some of them have their first token now."""
        if not self._scheduler.waiting:
            return False
        started_s = self.clock()
        is_alone = self._priority == 0 and self._scheduler.num_active == 0
        newcomer = self._runner.make_way()
        admission = self._scheduler.admit(
            self._max_pass_tokens * (LONE_PASS_FACTOR if is_alone else 1),
            self._runner.count_cached,
            newcomer,
        )
        for sequence in admission.admitted:
            sequence.started_s = started_s
        self._runner.begin(admission.long_prompts)
        if not admission.in_rows:
            return False
        with self._model():
            too_large = self._runner.fill_rows(admission)
        self._give_up(too_large)
        if started := [s for s in admission.started if not s.is_finished]:
            self._start(started, started_s)
        return bool(started)

    def _prefill_chunk(self) -> bool:
        """Run the next chunk of a long prompt; behind its last one the sequence runs."""
        long_prompt = self._scheduler.next_long_prompt()
        if long_prompt is None:
            return False
        started_s = self.clock()
        is_complete = self._attempt(lambda: self._runner.advance(long_prompt))
        if is_complete is None:
            self._give_up([long_prompt.sequence.group])
        elif is_complete:
            self._start([long_prompt.sequence], started_s)
        else:
            self._finish_step("prefill", 1, started_s)
        return True

    def _start(self, sequences: Sequence[Sample], started_s: float) -> None:
        """Draw the first tokens of sequences whose prompts are in their rows."""
        prefilled_s = self.clock()
        for sequence in sequences:
            sequence.prefilled_s = prefilled_s
            self._count_prompt(sequence.group)
        self._accept(sequences, torch.stack([s.group.take_logits() for s in sequences]))
        self._finish_step("prefill", len(sequences), started_s)

    def _count_prompt(self, group: SequenceGroup) -> None:
        """Report a request's prompt once, however often it is prefilled; scoring counts none."""
        if not group.is_prompt_counted and not group.is_scoring:
            group.is_prompt_counted = True
            self._observer.on_prompt(len(group.prompt.token_ids), group.num_cached_tokens)

    def _score(self) -> bool:
        """Run the next chunk of the scoring request whose turn it is."""
        job = self._scoring.first
        if job is None:
            return False
        started_s = self.clock()
        is_done = self._attempt(lambda: self._runner.score(job))
        if is_done is None:
            self._scoring.remove(job)
            self._fail(job, EngineFailedError(OUT_OF_MEMORY))
            return True
        if is_done:
            self._scoring.remove(job)
            self._release()
            job.future.set_result(job.scored)
        self._num_failed_steps = 0
        self._finish_step("score", 1, started_s)
        return True

    def _accept(self, sequences: Sequence[Sample], logits: torch.Tensor) -> bool:
        """Sample a token for each sequence, emit it, and retire the sequences that end.

        False when there was no memory for that.
        """
        batch = self._sample(sequences, logits)
        if batch is None:
            self._give_up(_expendable(sequences))
            return False
        now_s = self.clock()
        drawn = [s for s, is_finite in zip(sequences, batch.is_finite, strict=True) if is_finite]
        self._observe_tokens(drawn, now_s)
        finished = []
        for row, sequence in enumerate(sequences):
            if not batch.is_finite[row]:
                self._runner.taint(sequence)
            # A score may be -inf or NaN, as in one pass: whoever asked for it judges.
            is_usable = batch.is_finite[row] or sequence.group.is_scoring
            error = "" if is_usable else "the model returned non-finite logits"
            reason: FinishReason | None = FinishReason.ERROR
            if not error:
                if sequence.group.request.keep_logits:
                    sequence.logits.append(logits[row].cpu().clone())
                self._emit_token(sequence, batch, row, now_s)
                reason = sequence.finish_reason(self._eos_token_ids)
            if reason is not None:
                finished.append(sequence)
                self._emit_finished(sequence, reason, now_s, error)
        self._runner.retire(finished)
        return True

    def _sample(self, sequences: Sequence[Sample], logits: torch.Tensor) -> SampledBatch | None:
        """Return a token for each sequence; None when out of memory."""
        try:
            with self._unowned():  # here a model on CUDA is waited for
                return self._runner.try_twice(lambda _: self._sampler.sample(logits, sequences))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.exception("the %s engine has no memory to sample in", self.name)
            return None

    def _observe_tokens(self, sequences: Sequence[Sample], now_s: float) -> None:
        """Report the tokens that are being emitted at `now_s`; scoring emits none."""
        samples = [s for s in sequences if not s.group.is_scoring]
        self._observer.on_tokens(len(samples))
        for sequence in samples:
            if not sequence.group.has_token:
                sequence.group.has_token = True
                arrival_s = sequence.group.arrival_s
                self._observer.on_first_token(now_s - arrival_s, sequence.started_s - arrival_s)
        intervals = Counter(now_s - s.last_token_s for s in samples if s.token_ids)
        for itl_s, count in intervals.items():
            self._observer.on_token_interval(itl_s, count)

    # -- endings ----------------------------------------------------------------------------

    def _end_cancelled_and_expired(self) -> None:
        now_s = self.clock()
        for request_id in self._deadlines.pop_expired(now_s):
            self._end_request(request_id, FinishReason.DEADLINE, expired_by_s=now_s)
        self._end_marked()

    def _end_marked(self) -> None:
        if not self._endings:
            return
        now_s = self.clock()
        endings, self._endings = self._endings, {}
        running = [s for s in self._scheduler.running if id(s.group) in endings]
        unstarted = self._scheduler.remove_waiting(endings.keys())
        # Before any row moves, which may fail: nobody would find those that did not start again.
        for sequence in (*running, *unstarted):
            reason, error = endings[id(sequence.group)]
            self._emit_finished(sequence, reason, now_s, error)
        self._runner.retire(running)

    def _end_all(self, reason: FinishReason, error: str) -> None:
        now_s = self.clock()
        self._endings.clear()
        for sequence in self._scheduler.clear():
            # A step may fail between a sequence's terminal event and its leaving the batch.
            if not sequence.is_finished:
                self._emit_finished(sequence, reason, now_s, error)
        for job in self._scoring.clear():
            self._fail(job, scoring_error(reason, error))
        self._balance()
        self._outbox.flush()

    def _balance(self) -> None:
        """Compare the ledger with what is there."""
        scheduler = self._scheduler
        num_here = scheduler.num_active + len(scheduler.waiting) + len(self._scoring)
        self._num_unaccounted = self._num_inside - num_here

    def _fail(self, job: ScoringJob, error: Exception) -> None:
        self._release()
        job.future.set_exception(error)

    # -- events -----------------------------------------------------------------------------

    def _emit_token(self, sequence: Sample, batch: SampledBatch, row: int, now_s: float) -> None:
        if not sequence.token_ids:
            sequence.first_token_s = now_s
        sequence.last_token_s = now_s
        event = TokenEvent(
            index=sequence.index,
            position=len(sequence.token_ids),
            token_id=batch.token_ids[row],
            logprob=batch.logprobs[row],
            processed_logprob=batch.processed_logprobs[row],
            top_logprobs=batch.top_logprobs[row],
        )
        sequence.append(event.token_id, event.logprob, event.processed_logprob)
        self._outbox.add(sequence.group, event)

    def _emit_finished(
        self, sequence: Sample, reason: FinishReason, now_s: float, error: str
    ) -> None:
        group = sequence.group
        sequence.is_finished = True
        group.num_unfinished -= 1
        if group.num_unfinished == 0:
            self._forget(group)
        self._release()
        if not group.is_scoring:
            self._observer.on_finished(reason)
            if reason not in (FinishReason.STOP, FinishReason.LENGTH):
                self._observer.on_wasted(reason, len(sequence.token_ids))
        self._outbox.add(group, sequence.finished_event(reason, now_s, error))

    def _forget(self, group: SequenceGroup) -> None:
        request_id = group.request.request_id
        others = [g for g in self._groups.pop(request_id) if g is not group]
        if others:
            self._groups[request_id] = others

    # -- timing -----------------------------------------------------------------------------

    @contextmanager
    def _model(self) -> Iterator[None]:
        """Run the block as the model's part of a step: in this engine's turn, timed apart."""
        started_s = self.clock()
        self._current_step = 0  # the wait for the turn is another engine's step
        with self._arbiter.turn(self._priority) if self._arbiter else nullcontext():
            self._current_step = next(self._step_numbers)
            with self._unowned():
                yield
        self._model_s = self.clock() - started_s

    @contextmanager
    def _unowned(self) -> Iterator[None]:
        """Let other threads end the engine during the block. Raises _AbandonedError if one did."""
        self._ownership.release()
        try:
            yield
        finally:
            self._ownership.acquire()
            if self._is_abandoned:
                raise _AbandonedError

    def _finish_step(self, phase: str, batch_size: int, started_s: float) -> None:
        step_s = self.clock() - started_s
        self._observer.on_step(phase, batch_size, step_s, step_s - self._model_s)


def _expendable(sequences: Sequence[Sample]) -> list[SequenceGroup]:
    """Return the youngest request, or all that cannot try again: the logits they need are gone."""
    unstarted = [s.group for s in sequences if not s.token_ids]
    return unstarted or [max(sequences, key=lambda s: s.started_s).group]
