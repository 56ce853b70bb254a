"""The model's side of a step: which rows run, what enters and leaves them. It holds no queue."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from serve.backend import NUM_PREFILL_ROWS, NUM_SCORING_ROWS, Backend
from serve.prefill import Prefiller, PromptEntry
from serve.prefix_cache import PrefixCache
from serve.scheduler import Admission, LongPrompt, Scheduler
from serve.scoring import ScoringJob
from serve.sequence import Sequence as Sample
from serve.sequence import SequenceGroup


class Runner:
    """Runs what `scheduler` decides; every pass takes at most `max_pass_tokens` prompt tokens."""

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
        prefix_cache = PrefixCache(backend, max_prefix_cache_bytes)
        self._prefiller = Prefiller(backend, prefix_cache, max_pass_tokens)
        # Long prompts that are entering, by row.
        self._entries: dict[int, PromptEntry] = {}

    def decode(self) -> torch.Tensor:
        """Run the newest token of every running sequence; returns the logits, `(B, V)`."""
        running = self._scheduler.running
        return self._backend.forward(
            0, [s.token_ids[-1:] for s in running], [s.num_cached_tokens for s in running]
        )

    def count_cached(self, group: SequenceGroup) -> int:
        """Return how much of a prompt the prefix cache holds; see `Prefiller.count_cached`."""
        return self._prefiller.count_cached(group.prompt)

    def begin(self, long_prompts: Sequence[LongPrompt]) -> None:
        """Restore what is cached of long prompts; `advance` runs the rest."""
        for prompt in long_prompts:
            self._entries[prompt.row] = self._prefiller.begin(
                prompt.sequence.group.prompt, prompt.row
            )

    def fill_rows(self, admission: Admission) -> None:
        """Bring the prompts of those who start into their rows, the last of the running ones.

        What is cached is restored before new prompts may push it out of the cache.
        """
        running = self._scheduler.running
        first_row = len(running) - len(admission.started)
        num_prefills = len(admission.prefills)
        for row, sequence in enumerate(admission.restores, first_row + num_prefills):
            _complete(sequence.group, self._prefiller.begin(sequence.group.prompt, row))
        if admission.prefills:
            prompts = [sequence.group.prompt for sequence in admission.prefills]
            entries = self._prefiller.run_batch(first_row, prompts)
            for sequence, entry in zip(admission.prefills, entries, strict=True):
                _complete(sequence.group, entry)
        first_fork = len(running) - len(admission.forks)
        for row, (fork, holder) in enumerate(admission.forks, first_fork):
            self._backend.copy_kv(running.index(holder), row, len(fork.group.prompt.token_ids))

    def advance(self, prompt: LongPrompt) -> bool:
        """Run a long prompt's next chunk; True when it is complete and its sequence runs."""
        entry = self._entries[prompt.row]
        self._prefiller.advance(entry)
        if entry.logits is None:
            return False
        self._backend.copy_kv(prompt.row, self._scheduler.start(prompt), entry.num_entered)
        _complete(prompt.sequence.group, entry)
        return True

    def score(self, job: ScoringJob) -> None:
        """Run a scoring request's next chunk."""
        first_row = self._scheduler.max_num_seqs + 1 + NUM_PREFILL_ROWS
        job.advance(self._prefiller, first_row, NUM_SCORING_ROWS, self._max_pass_tokens)

    def retire(self, finished: list[Sample]) -> None:
        """Take sequences out of the batch and close the gaps they leave."""
        for move in self._scheduler.retire(finished):
            self._backend.copy_kv(move.source, move.target, move.length)


def _complete(group: SequenceGroup, entry: PromptEntry) -> None:
    group.prompt_logits = entry.logits
    if not group.is_prompt_counted:
        group.num_cached_tokens = entry.num_cached
