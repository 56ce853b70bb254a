"""The model's side of a step: which rows run, what enters and leaves them. It holds no queue."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from serve.engine.prefill import Prefiller, PromptEntry
from serve.engine.prefix_cache import PrefixCache
from serve.engine.prompt import TokenizedPrompt
from serve.engine.scheduler import Admission, LongPrompt, RowMove, Scheduler
from serve.engine.scoring import ScoringJob
from serve.engine.sequence import Sequence as Sample
from serve.engine.sequence import SequenceGroup
from serve.models.backend import (
    Backend,
    is_out_of_memory,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Runner:
    """Runs what `scheduler` decides; every pass takes at most `max_pass_tokens` prompt tokens.

    A pass that runs out of memory is tried once more: without the prefix cache, which lies in the
    same memory, and of prompts and scorings only half as much of one at a time. What a method
    raises for want of memory (`serve.models.backend`) has changed nothing that others need.
    """

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler,
        max_pass_tokens: int,
        max_prefix_cache_bytes: int,
    ) -> None:
        self._backend = backend
        self._scheduler = scheduler
        self._max_pass_tokens = max_pass_tokens
        self._prefix_cache = PrefixCache(backend, max_prefix_cache_bytes)
        self._prefiller = Prefiller(backend, self._prefix_cache, max_pass_tokens)
        # Long prompts that are entering, or were on their way when they ended, by row.
        self._entries: dict[int, PromptEntry] = {}
        # Rows with keys or values that are not finite: whoever enters next must not see them.
        self._tainted_rows: set[int] = set()

    def decode(self) -> torch.Tensor:
        """Run the newest token of every running sequence; returns the logits, `(B, V)`."""
        running = self._scheduler.running
        newest = [s.token_ids[-1:] for s in running]
        past_lengths = [s.num_cached_tokens for s in running]
        return self.try_twice(lambda _: self._backend.forward(0, newest, past_lengths))

    def try_twice(self, run: Callable[[int], T]) -> T:
        """Call `run` with the tokens of a pass; when memory runs out, make room, and with half."""
        try:
            return run(self._max_pass_tokens)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("out of memory, trying again with less: %s", error)
        # Behind the except: a traceback holds what the failed pass had.
        self._make_room()
        return run(max(self._max_pass_tokens // 2, 2))

    def distrust_rows(self) -> None:
        """Have every row scrubbed before somebody else uses it.

        What a pass that failed, or whose logits nobody saw, has written may not be finite.
        """
        self._tainted_rows.update(range(self._backend.info.rows.num_rows))

    def _make_room(self) -> None:
        self.distrust_rows()
        self._prefix_cache.clear()
        if torch.device(self._backend.info.device).type == "cuda":
            torch.cuda.empty_cache()

    def count_cached(self, group: SequenceGroup) -> int:
        """Return how much of a prompt the prefix cache holds; see `Prefiller.count_cached`."""
        return self._prefiller.count_cached(group.prompt)

    def begin(self, long_prompts: Sequence[LongPrompt]) -> None:
        """Restore what is cached of long prompts; `advance` runs the rest."""
        for prompt in long_prompts:
            previous = self._entries.get(prompt.row)
            if previous is not None and not previous.is_finite:
                self._tainted_rows.add(prompt.row)
            self._clean(prompt.row)
            self._entries[prompt.row] = self._prefiller.begin(
                prompt.sequence.group.prompt, prompt.row
            )

    def fill_rows(self, admission: Admission) -> list[SequenceGroup]:
        """Bring the prompts of those who start into their rows, the last of the running ones.

        What is cached is restored before new prompts may push it out of the cache. Returns those
        whose prompt alone takes more memory than there is.
        """
        running = self._scheduler.running
        first_row = len(running) - len(admission.in_rows)
        num_prefills = len(admission.prefills)
        for row in range(first_row, len(running)):
            self._clean(row)
        for row, sequence in enumerate(admission.restores, first_row + num_prefills):
            _complete(sequence.group, self._prefiller.begin(sequence.group.prompt, row))
        failed = []
        if admission.prefills:
            prompts = [sequence.group.prompt for sequence in admission.prefills]
            entries = self._prefill(first_row, prompts)
            for sequence, entry in zip(admission.prefills, entries, strict=True):
                if entry is None:
                    failed.append(sequence.group)
                else:
                    _complete(sequence.group, entry)
        # Before the forks, which may copy from them.
        for row, sequence in enumerate(admission.resumed, len(running) - len(admission.resumed)):
            assert sequence.kv is not None, "it was not set aside"
            self._backend.write_kv(row, 0, sequence.kv)
            sequence.kv = None
        first_fork = first_row + num_prefills + len(admission.restores)
        for row, (fork, holder) in enumerate(admission.forks, first_fork):
            self._backend.copy_kv(running.index(holder), row, len(fork.group.prompt.token_ids))
        return failed

    def _prefill(
        self, first_row: int, prompts: Sequence[TokenizedPrompt]
    ) -> Sequence[PromptEntry | None]:
        """Run whole prompts in one pass, or else one by one; None: not even so."""

        def run(max_tokens: int) -> Sequence[PromptEntry | None]:
            if max_tokens == self._max_pass_tokens:
                return self._prefiller.run_batch(first_row, prompts)
            return [
                self._prefill_alone(row, prompt, max_tokens)
                for row, prompt in enumerate(prompts, first_row)
            ]

        return self.try_twice(run)

    def _prefill_alone(
        self, row: int, prompt: TokenizedPrompt, max_tokens: int
    ) -> PromptEntry | None:
        entry = PromptEntry(prompt, row)
        try:
            while entry.logits is None:
                # Each of these passes is a new one, and has its second try.
                self.try_twice(
                    lambda tokens: self._prefiller.advance(entry, min(tokens, max_tokens))
                )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("out of memory on one prompt alone: %s", error)
            return None
        return entry

    def advance(self, prompt: LongPrompt) -> bool:
        """Run a long prompt's next chunk; True when it is complete and its sequence runs."""
        entry = self._entries[prompt.row]
        self.try_twice(lambda max_tokens: self._prefiller.advance(entry, max_tokens))
        if entry.logits is None:
            return False
        del self._entries[prompt.row]
        if not entry.is_finite:
            self._tainted_rows.add(prompt.row)
        row = self._scheduler.start(prompt)
        self._clean(row)
        self._backend.copy_kv(prompt.row, row, entry.num_entered)
        _complete(prompt.sequence.group, entry)
        return True

    def score(self, job: ScoringJob) -> bool:
        """Run a scoring request's next chunk; True when it is done."""
        rows = self._backend.info.rows.scoring
        if not job.is_begun:
            for row in rows:
                self._clean(row)
        self.try_twice(
            lambda max_tokens: job.advance(self._prefiller, rows.start, len(rows), max_tokens)
        )
        if not job.is_finite:
            self._tainted_rows.update(rows)
        return job.is_done

    def taint(self, sequence: Sample) -> None:
        """Remember that the logits of a running sequence, so its row, are not finite."""
        self._tainted_rows.add(self._scheduler.running.index(sequence))

    def _clean(self, row: int) -> None:
        """Prepare a row for another sequence."""
        if row in self._tainted_rows:
            self._backend.scrub_kv(row)
            self._tainted_rows.remove(row)

    def make_way(self) -> Sample | None:
        """Set a running sequence aside for one that must not wait, and return that one.

        None where there is none, or no memory for the keys and values of the other.
        """
        claim = self._scheduler.find_claim(self.count_cached)
        if claim is None:
            return None
        victim, row = claim.victim, self._scheduler.running.index(claim.victim)
        try:
            victim.kv = self._backend.read_kv(row, 0, victim.num_cached_tokens)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("out of memory, nobody is set aside: %s", error)
            return None
        self._close_gaps(self._scheduler.set_aside(victim))
        return claim.newcomer

    def retire(self, finished: list[Sample]) -> None:
        """Take sequences out of the batch and close the gaps they leave."""
        self._close_gaps(self._scheduler.retire(finished))

    def _close_gaps(self, moves: Iterable[RowMove]) -> None:
        for move in moves:
            self._clean(move.target)
            if move.source in self._tainted_rows:
                self._tainted_rows.add(move.target)
            self._backend.copy_kv(move.source, move.target, move.length)


def _complete(group: SequenceGroup, entry: PromptEntry) -> None:
    group.prompt_logits = entry.logits
    if not group.is_prompt_counted:
        group.num_cached_tokens = entry.num_cached
