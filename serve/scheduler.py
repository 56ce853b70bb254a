"""Who runs next. Holds sequences and counts; no tensors, no model, no clock.

The running sequences are rows 0..b-1 of the KV cache: row i belongs to `running[i]`. When one
ends, the last row moves into its place, so the cost of a step follows the number running.

A prompt of at most `max_chunk_tokens` enters its row in one pass, together with others. A longer
one gets one of `NUM_PREFILL_ROWS` further rows, enters it chunk by chunk, in turns with other long
ones, and moves to a row of its own when it is complete. So neither many short prompts nor a long
one can hold up the others.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field

from serve.backend import NUM_PREFILL_ROWS
from serve.sequence import Sequence, SequenceGroup

# How many waiting sequences that lack a row for a long prompt others may overtake in one step.
MAX_OVERTAKEN = 64

CountCached = Callable[[SequenceGroup], int]
"""How many of a prompt's leading tokens need not be computed; all of them: nor their logits."""


class _Way(enum.Enum):
    """How a waiting sequence's prompt gets into the cache, or that it cannot yet."""

    FORK = enum.auto()
    RESTORE = enum.auto()
    PREFILL = enum.auto()
    CHUNKS = enum.auto()
    WAIT = enum.auto()


@dataclass(frozen=True, slots=True)
class RowMove:
    """The cache row `source` must be copied over `target` before the next step."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """A sequence whose prompt is entering `row`, which is none of the running ones' rows."""

    sequence: Sequence
    row: int


@dataclass(slots=True)
class Admission:
    """Sequences that just left the queue, by how their prompt gets into the cache.

    `prefills` run through the model in one batch, `restores` are cached as a whole, `forks` copy
    the prompt's keys and values from the sequence of the same group that is named beside them.
    They take the next rows, in this order. `long_prompts` are not running yet.
    """

    prefills: list[Sequence] = field(default_factory=list)
    restores: list[Sequence] = field(default_factory=list)
    forks: list[tuple[Sequence, Sequence]] = field(default_factory=list)
    long_prompts: list[LongPrompt] = field(default_factory=list)

    @property
    def started(self) -> list[Sequence]:
        """The sequences that run from this step on, in the order of their rows."""
        return [*self.prefills, *self.restores, *(sequence for sequence, _ in self.forks)]

    @property
    def admitted(self) -> list[Sequence]:
        return [*self.started, *(prompt.sequence for prompt in self.long_prompts)]

    def __len__(self) -> int:
        num_started = len(self.prefills) + len(self.restores) + len(self.forks)
        return num_started + len(self.long_prompts)


class Scheduler:
    """First come, first served, up to `max_num_seqs` sequences that run or prefill."""

    def __init__(self, max_num_seqs: int, max_chunk_tokens: int) -> None:
        self.max_num_seqs = max_num_seqs
        self._max_active = max_num_seqs
        self.max_chunk_tokens = max_chunk_tokens
        self.waiting: deque[Sequence] = deque()
        self.prefilling: deque[LongPrompt] = deque()
        self.running: list[Sequence] = []
        first_row = max_num_seqs + 1
        self._free_rows = list(range(first_row, first_row + NUM_PREFILL_ROWS))

    def add(self, sequences: Iterable[Sequence]) -> None:
        self.waiting.extend(sequences)

    @property
    def num_active(self) -> int:
        return len(self.running) + len(self.prefilling)

    def admit_no_more(self) -> None:
        """Keep to as many sequences as there are now, one at least, until there are none."""
        self._max_active = max(self.num_active, 1)

    def admit(
        self, max_batch_tokens: int, count_cached: CountCached = lambda group: 0
    ) -> Admission:
        """Move sequences from the queue into free rows, in the order in which they came.

        Only a sequence that waits for a row for its long prompt, or for a long prompt that it
        shares, is overtaken. A batch of prefills, padding included, stays within
        `max_batch_tokens`, but always takes the first.
        """
        admission = Admission()
        if self.num_active == 0:
            self._max_active = self.max_num_seqs
        # By group: the sequence to fork from; None while a long prompt is entering.
        holders: dict[int, Sequence | None] = {id(p.sequence.group): None for p in self.prefilling}
        holders |= {id(s.group): s for s in self.running}
        overtaken: list[Sequence] = []
        while self.waiting and len(overtaken) < MAX_OVERTAKEN:
            if self.num_active + len(admission) >= self._max_active:
                break
            way = self._way_in(self.waiting[0], holders, count_cached)
            if way is _Way.PREFILL and not _fits(
                admission.prefills, self.waiting[0], max_batch_tokens
            ):
                break
            sequence = self.waiting.popleft()
            if way is _Way.WAIT:
                overtaken.append(sequence)
            else:
                self._place(sequence, way, admission, holders)
        self.waiting.extendleft(reversed(overtaken))
        self.running += admission.started
        self.prefilling += admission.long_prompts
        return admission

    def _way_in(
        self, sequence: Sequence, holders: dict[int, Sequence | None], count_cached: CountCached
    ) -> _Way:
        group = sequence.group
        if id(group) in holders:
            return _Way.WAIT if holders[id(group)] is None else _Way.FORK
        num_tokens = len(group.request.prompt_token_ids)
        num_cached = count_cached(group)
        if num_cached == num_tokens:
            return _Way.RESTORE
        if num_cached == 0 and num_tokens <= self.max_chunk_tokens:
            return _Way.PREFILL
        return _Way.CHUNKS if self._free_rows else _Way.WAIT

    def _place(
        self,
        sequence: Sequence,
        way: _Way,
        admission: Admission,
        holders: dict[int, Sequence | None],
    ) -> None:
        group_id = id(sequence.group)
        if way is _Way.FORK:
            holder = holders[group_id]
            assert holder is not None
            admission.forks.append((sequence, holder))
        elif way is _Way.CHUNKS:
            admission.long_prompts.append(LongPrompt(sequence, self._free_rows.pop(0)))
            holders[group_id] = None
        else:
            started = admission.restores if way is _Way.RESTORE else admission.prefills
            started.append(sequence)
            holders[group_id] = sequence

    def next_long_prompt(self) -> LongPrompt | None:
        """Return the long prompt whose turn it is, and give the next turn to another one."""
        if not self.prefilling:
            return None
        self.prefilling.rotate(-1)
        return self.prefilling[-1]

    def start(self, prompt: LongPrompt) -> int:
        """Let the sequence of a complete long prompt run; returns the row to copy it to."""
        self._leave(prompt)
        self.running.append(prompt.sequence)
        return len(self.running) - 1

    def _leave(self, prompt: LongPrompt) -> None:
        self.prefilling.remove(prompt)
        self._free_rows.append(prompt.row)

    def remove_unstarted(self, group_ids: Set[int]) -> list[Sequence]:
        """Take the sequences of these groups (by `id`) that do not run yet out; return them."""
        entering = [p for p in self.prefilling if id(p.sequence.group) in group_ids]
        for prompt in entering:
            self._leave(prompt)
        removed = [s for s in self.waiting if id(s.group) in group_ids]
        if removed:
            self.waiting = deque(s for s in self.waiting if id(s.group) not in group_ids)
        return [*(p.sequence for p in entering), *removed]

    def clear(self) -> list[Sequence]:
        """Forget everything; returns the sequences that were here."""
        sequences = [*self.running, *(p.sequence for p in self.prefilling), *self.waiting]
        for prompt in list(self.prefilling):
            self._leave(prompt)
        self.running.clear()
        self.waiting.clear()
        return sequences

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


def _fits(prefills: list[Sequence], sequence: Sequence, max_tokens: int) -> bool:
    """Whether one more prefill keeps the batch, padded to its longest, within `max_tokens`."""
    lengths = [len(s.group.request.prompt_token_ids) for s in (*prefills, sequence)]
    return not prefills or max(lengths) * len(lengths) <= max_tokens
