"""What an engine does next, and what comes of it: every request from its arrival to its end.

Holds sequences, counts and times; no tensors, no model, no locks. A step is a loop over
`schedule`, in which each `Work` is chosen when the one before it has been given to `update`.
`serve.engine.rows` says who has a row, `serve.engine.waiting` who waits for one.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from serve.engine.mail import Outbox
from serve.engine.rows import Rows
from serve.engine.sequence import (
    Chunk,
    Decode,
    FinishReason,
    OutOfMemory,
    PassResult,
    RowMove,
    Score,
    Sequence,
    SequenceGroup,
    SetAside,
    TokenEvent,
    Work,
)
from serve.engine.stats import StepStats
from serve.engine.waiting import Deadlines, ScoringQueue, is_past

if TYPE_CHECKING:
    from serve.engine.scoring import ScoringJob
    from serve.sampling.sampler import SampledBatch

OUT_OF_MEMORY = "the model ran out of memory on this request"
NOT_FINITE = "the model returned non-finite logits"


class Scheduler:
    """Decides what runs, and ends what is over; whoever is to know is told through `outbox`."""

    def __init__(
        self,
        rows: Rows,
        eos_token_ids: frozenset[int],
        outbox: Outbox,
        stats: StepStats,
        clock: Callable[[], float],
    ) -> None:
        self.rows = rows
        self.scoring = ScoringQueue()
        self._eos_token_ids = eos_token_ids
        self._outbox = outbox
        self._stats = stats
        self._clock = clock
        # Passes beside decode steps: one per step, of the kinds that have work in turns.
        self._kinds = deque([self._score, self._prefill, self._chunk])
        self._has_passed = False
        # A request id may name several: a generation, and the scoring of other samples.
        self._groups: defaultdict[str, list[SequenceGroup]] = defaultdict(list)
        # By `id` of the group: what ends before the next pass, for what reason and with what error.
        # A step looks at these, and at the earliest deadline, never at everything that waits.
        self._endings: dict[int, tuple[FinishReason, str]] = {}
        self._deadlines = Deadlines(self._live_ids)
        self._moves: list[RowMove] = []

    @property
    def num_here(self) -> int:
        """How many samples and scoring requests have not ended."""
        return self.rows.num_active + len(self.rows.waiting) + len(self.scoring)

    @property
    def has_work(self) -> bool:
        rows = self.rows
        return bool(rows.running or rows.prefilling or rows.waiting or self.scoring)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is remembered of any request."""
        return not (self.has_work or self._groups or self._endings)

    # -- commands ---------------------------------------------------------------------------

    def add(self, group: SequenceGroup, sequences: Iterable[Sequence]) -> None:
        self._groups[group.request.request_id].append(group)
        self.rows.waiting.add(sequences)
        self._watch_deadline(group.request.request_id, group.request.deadline_s)

    def add_scoring(self, job: ScoringJob) -> None:
        self.scoring.add(job)
        self._watch_deadline(job.request.request_id, job.request.deadline_s)

    def end_request(
        self, request_id: str, reason: FinishReason, expired_by_s: float | None = None
    ) -> None:
        """Mark groups for their end and fail scoring jobs: all of a request, or the expired ones.

        Keyed by request, not by group: a deadline may outlive what it was made for.
        """
        for group in self._groups.get(request_id, ()):
            if expired_by_s is None or is_past(group.request.deadline_s, expired_by_s):
                self._endings.setdefault(id(group), (reason, ""))
        for job in self.scoring.of(request_id):
            if expired_by_s is None or is_past(job.request.deadline_s, expired_by_s):
                self._fail(job, reason, "")

    def _watch_deadline(self, request_id: str, deadline_s: float | None) -> None:
        if deadline_s is not None:
            self._deadlines.add(deadline_s, request_id)

    def _live_ids(self) -> set[str]:
        return {*self._groups, *(job.request.request_id for job in self.scoring)}

    # -- what is next -----------------------------------------------------------------------

    def schedule(self) -> Iterator[Work]:
        """Yield a decode step, then a prefill or scoring pass, where there is work for them."""
        if self.rows.running:
            yield Decode(tuple(self.rows.running), self._clock())
        self._has_passed = False
        # One more than there are kinds: admission may have given the kind behind it work.
        for _ in range(len(self._kinds) + 1):
            self._kinds.rotate(-1)
            yield from self._kinds[-1]()
            if self._has_passed:
                return

    def _prefill(self) -> Iterable[Work]:
        """Let waiting sequences in."""
        return self._admit() if self.rows.waiting else ()

    def _admit(self) -> Iterator[Work]:
        started_s = self._clock()
        claim = self.rows.find_claim(started_s)
        newcomer = None
        if claim is not None:
            yield claim
            if claim.victim.kv is not None and not claim.newcomer.is_finished:
                newcomer = claim.newcomer
        if (prefill := self.rows.admit(started_s, newcomer)) is not None:
            yield prefill

    def _chunk(self) -> Iterable[Work]:
        """Run the next chunk of a long prompt."""
        prompt = self.rows.next_long_prompt()
        if prompt is None:
            return ()
        return (Chunk(prompt, len(self.rows.running), self._clock()),)

    def _score(self) -> Iterable[Work]:
        """Run the next chunk of the scoring request whose turn it is."""
        job = self.scoring.first
        return () if job is None else (Score(job, self._clock()),)

    # -- what came of it --------------------------------------------------------------------

    def update(self, work: Work, result: PassResult) -> None:
        """Take the tokens of a pass, and start and end sequences; `take_moves` says what moved."""
        if result.out_of_memory is not None:
            self._give_up(work, result.out_of_memory, has_run=result.num_rows > 0)
        elif isinstance(work, SetAside):
            self._moves += self.rows.set_aside(work.victim)
        elif isinstance(work, Score) and work.job.is_done:
            self.scoring.remove(work.job)
            self._outbox.add_outcome(work.job.finish)
        if not isinstance(work, Decode):
            self._has_passed = bool(result.sequences) or isinstance(work, (Chunk, Score))
            self._start(work, result)
        if result.batch is not None:
            self._accept(result.sequences, result.batch)
            if isinstance(work, Decode):
                self.rows.note_decoded()

    def _give_up(self, work: Work, lacking: OutOfMemory, *, has_run: bool) -> None:
        """End what there was no memory for."""
        if isinstance(work, Score):
            self._fail(work.job, FinishReason.ERROR, OUT_OF_MEMORY)
        self._end({id(group): (FinishReason.ERROR, OUT_OF_MEMORY) for group in lacking.groups})
        if isinstance(work, Decode) and not has_run:
            self.rows.admit_no_more()  # or the next ones would end others in turn

    def _start(self, work: Work, result: PassResult) -> None:
        """Note when prompts were complete; a sequence whose prompt was long runs from now on."""
        for sequence in result.sequences:
            sequence.prefilled_s = result.ended_s
            self._stats.on_prompt(sequence.group)
        if isinstance(work, Chunk) and result.batch is not None:
            self.rows.start(work.prompt)

    def _accept(self, sequences: tuple[Sequence, ...], batch: SampledBatch) -> None:
        """Emit a token of each sequence, and retire the sequences that end."""
        now_s = self._clock()
        self._stats.on_tokens(sequences, batch.is_finite, now_s)
        finished = []
        for row, sequence in enumerate(sequences):
            reason: FinishReason | None
            # A score may be -inf or NaN, as in one pass: whoever asked for it judges.
            if batch.is_finite[row] or sequence.group.is_scoring:
                self._emit_token(sequence, batch, row, now_s)
                reason, error = sequence.finish_reason(self._eos_token_ids), ""
            else:
                reason, error = FinishReason.ERROR, NOT_FINITE
            if reason is not None:
                finished.append(sequence)
                self._emit_finished(sequence, reason, now_s, error)
        self._moves += self.rows.retire(finished)

    def take_moves(self) -> Iterable[RowMove]:
        """Return, and forget, the copies of rows that are due before the next pass, in order."""
        if not self._moves:
            return ()
        moves, self._moves = self._moves, []
        return moves

    # -- endings ----------------------------------------------------------------------------

    def end_due(self) -> None:
        """End what was cancelled, and that whose deadline has come."""
        now_s = self._clock()
        for request_id in self._deadlines.pop_expired(now_s):
            self.end_request(request_id, FinishReason.DEADLINE, expired_by_s=now_s)
        if self._endings:
            endings, self._endings = self._endings, {}
            self._end(endings)

    def end_all(self, reason: FinishReason, error: str) -> None:
        """End everything, also in the middle of a step that failed."""
        now_s = self._clock()
        self._endings.clear()
        self._moves.clear()
        for sequence in self.rows.clear():
            # A step may fail between a sequence's terminal event and its leaving the batch.
            if not sequence.is_finished:
                self._emit_finished(sequence, reason, now_s, error)
        for job in self.scoring.clear():
            self._outbox.add_outcome(partial(job.fail, reason, error))

    def _end(self, endings: dict[int, tuple[FinishReason, str]]) -> None:
        if not endings:
            return
        now_s = self._clock()
        running = [s for s in self.rows.running if id(s.group) in endings]
        for sequence in (*running, *self.rows.remove_waiting(endings.keys())):
            reason, error = endings[id(sequence.group)]
            self._emit_finished(sequence, reason, now_s, error)
        self._moves += self.rows.retire(running)

    def _fail(self, job: ScoringJob, reason: FinishReason, error: str) -> None:
        self.scoring.remove(job)
        self._outbox.add_outcome(partial(job.fail, reason, error))

    # -- events -----------------------------------------------------------------------------

    def _emit_token(self, sequence: Sequence, batch: SampledBatch, row: int, now_s: float) -> None:
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
        self, sequence: Sequence, reason: FinishReason, now_s: float, error: str
    ) -> None:
        group = sequence.group
        sequence.is_finished = True
        group.num_unfinished -= 1
        if group.num_unfinished == 0:
            self._forget(group)
        self._stats.on_finished(sequence, reason)
        self._outbox.add_last(group, sequence.finished_event(reason, now_s, error))

    def _forget(self, group: SequenceGroup) -> None:
        request_id = group.request.request_id
        others = [g for g in self._groups.pop(request_id) if g is not group]
        if others:
            self._groups[request_id] = others
