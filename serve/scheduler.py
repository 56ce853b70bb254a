"""Who runs next. Holds sequences and counts; no tensors, no model, no clock.

The running sequences are rows 0..b-1 of the KV cache: row i belongs to `running[i]`. When one
ends, the last row moves into its place, so the cost of a step follows the number running.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Set
from dataclasses import dataclass, field

from serve.sequence import Sequence


@dataclass(frozen=True, slots=True)
class RowMove:
    """The cache row `source` must be copied over `target` before the next step."""

    source: int
    target: int
    length: int


@dataclass(slots=True)
class Admission:
    """Sequences that just left the queue, by how their prompt gets into the cache.

    `prefills` run through the model, in consecutive rows; `forks` copy the prompt's keys and
    values from the sequence of the same group that is named beside them.
    """

    prefills: list[Sequence] = field(default_factory=list)
    forks: list[tuple[Sequence, Sequence]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.prefills or self.forks)


class Scheduler:
    """First come, first served, up to `max_num_seqs` running sequences."""

    def __init__(self, max_num_seqs: int, max_prefill_tokens: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_prefill_tokens = max_prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequences: Iterable[Sequence]) -> None:
        self.waiting.extend(sequences)

    def admit(self) -> Admission:
        """Move sequences from the queue into free rows, prefills in front of forks.

        Right padding makes a prefill cost (longest prompt) x (number of prompts); admission stops
        before that product exceeds `max_prefill_tokens`, but always takes the first.
        """
        admission = Admission()
        owner = {id(s.group): s for s in self.running}
        num_free = self.max_num_seqs - len(self.running)
        longest = 0
        while self.waiting and num_free > 0:
            sequence = self.waiting[0]
            holder = owner.get(id(sequence.group))
            if holder is None:
                longest = max(longest, len(sequence.group.request.prompt_token_ids))
                num_prefills = len(admission.prefills) + 1
                if num_prefills > 1 and longest * num_prefills > self.max_prefill_tokens:
                    break
                admission.prefills.append(sequence)
                owner[id(sequence.group)] = sequence
            else:
                admission.forks.append((sequence, holder))
            self.waiting.popleft()
            num_free -= 1
        self.running += admission.prefills
        self.running += [sequence for sequence, _ in admission.forks]
        return admission

    def remove_waiting(self, group_ids: Set[int]) -> list[Sequence]:
        """Take the waiting sequences of these groups (by `id`) out of the queue; return them."""
        removed = [s for s in self.waiting if id(s.group) in group_ids]
        if removed:
            self.waiting = deque(s for s in self.waiting if id(s.group) not in group_ids)
        return removed

    def retire(self, finished: list[Sequence]) -> list[RowMove]:
        """Free the rows of finished sequences; returns the copies that keep the rows compact."""
        moves = []
        for sequence in finished:
            row = self.running.index(sequence)
            last = self.running.pop()
            if last is not sequence:
                moves.append(RowMove(len(self.running), row, last.num_cached_tokens))
                self.running[row] = last
        return moves
