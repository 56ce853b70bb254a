"""Who has a row of the KV cache, and who gets one next. No tensors, no model, no clock.

The running sequences are rows 0..b-1: row i belongs to `running[i]`. When one ends, the last row
moves into its place, so the cost of a step follows the number running.

A prompt of at most `max_chunk_tokens` enters its row in one pass, together with others. A longer
one gets one of a few further rows, enters it chunk by chunk, in turns with other long
ones, and moves to a row of its own when it is complete. So neither many short prompts nor a long
one can hold up the others.

Who waits takes turns (`serve.engine.waiting`). Where all rows are taken, who has none need not wait
until a sequence ends: one of those who have most is set aside, its keys and values kept, and goes
on later with the same tokens.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from itertools import islice

from serve.engine.sequence import (
    LongPrompt,
    Prefill,
    RowMove,
    Sequence,
    SequenceGroup,
    SetAside,
)
from serve.engine.waiting import WaitingLines
from serve.models.backend import RowLayout

# How many waiting requests that lack a row for a long prompt others may overtake in one step.
MAX_OVERTAKEN = 64
# After a decode step without memory: so many that had enough until one more sequence may run, twice
# as many after the next such step, and so on. Each trial may cost a request.
MIN_CALM_STEPS, MAX_CALM_STEPS = 64, 4096

CountCached = Callable[[SequenceGroup], int]
"""How many of a prompt's leading tokens need not be computed; all of them: nor their logits."""


class _Way(enum.Enum):
    """How a waiting sequence's prompt gets into the cache, or that it cannot yet."""

    FORK = enum.auto()
    RESTORE = enum.auto()
    PREFILL = enum.auto()
    CHUNKS = enum.auto()
    RESUME = enum.auto()
    WAIT = enum.auto()


@dataclass(frozen=True, slots=True)
class RowLimits:
    """How many sequences may run, each client's too (None: all), and how long a prompt's pass is.

    A prefill takes `max_chunk_tokens`, padding included; `lone_pass_tokens` where nothing runs.
    """

    max_num_seqs: int
    max_chunk_tokens: int
    lone_pass_tokens: int
    max_num_seqs_per_client: int | None = None


@dataclass(frozen=True, slots=True)
class _RowsInUse:
    """How many rows each client has, and each group, by `id`."""

    by_client: Counter[str]
    by_group: Counter[int]

    @classmethod
    def of(cls, sequences: list[Sequence]) -> _RowsInUse:
        return cls(
            Counter(sequence.client for sequence in sequences),
            Counter(id(sequence.group) for sequence in sequences),
        )

    def cost_of_losing(self, sequence: Sequence) -> tuple[int, int]:
        """Order sequences: first those of the largest group, of these the shortest."""
        return -self.by_group[id(sequence.group)], sequence.num_cached_tokens


@dataclass(slots=True)
class _Admission:
    """A `Prefill` in the making; each of `forks` stands beside the sequence that it copies from."""

    prefills: list[Sequence] = field(default_factory=list)
    restores: list[Sequence] = field(default_factory=list)
    forks: list[tuple[Sequence, Sequence]] = field(default_factory=list)
    resumed: list[Sequence] = field(default_factory=list)
    long_prompts: list[LongPrompt] = field(default_factory=list)

    @property
    def in_rows(self) -> tuple[Sequence, ...]:
        """The sequences that take the rows behind the running ones, in this order."""
        forks = [sequence for sequence, _ in self.forks]
        return (*self.prefills, *self.restores, *forks, *self.resumed)

    @property
    def num_in_rows(self) -> int:
        return len(self.prefills) + len(self.restores) + len(self.forks) + len(self.resumed)


class Rows:
    """Up to `max_num_seqs` sequences run or prefill, `max_num_seqs_per_client` of each client."""

    def __init__(self, limits: RowLimits, count_cached: CountCached = lambda group: 0) -> None:
        self._limits = limits
        self._count_cached = count_cached
        max_num_seqs = limits.max_num_seqs
        self._max_per_client = min(limits.max_num_seqs_per_client or max_num_seqs, max_num_seqs)
        # What one of several requests of a client may keep, and takes in one turn.
        self._share = max(self._max_per_client // 2, 1)
        self._max_active = max_num_seqs
        self._calm_steps = 0  # that must pass before the next trial; 0: memory is not short
        self._num_calm = 0
        self.waiting = WaitingLines(self._share)
        self.prefilling: deque[LongPrompt] = deque()
        self.running: list[Sequence] = []
        self._free_rows = list(RowLayout(max_num_seqs).prefill)

    @property
    def num_active(self) -> int:
        return len(self.running) + len(self.prefilling)

    def admit_no_more(self) -> None:
        """Keep to as many sequences as there are now, one at least, while memory is short."""
        self._max_active = max(self.num_active, 1)
        self._num_calm = 0
        self._calm_steps = min(max(2 * self._calm_steps, MIN_CALM_STEPS), MAX_CALM_STEPS)

    def note_decoded(self) -> None:
        """Let one more run, once as many as may have had memory enough for some time."""
        if self._calm_steps == 0 or len(self.running) < self._max_active:
            return
        self._num_calm += 1
        if self._num_calm < self._calm_steps:
            return
        self._num_calm = 0
        if self._max_active < self._limits.max_num_seqs:
            self._max_active += 1
        else:
            self._calm_steps = 0

    def find_claim(self, now_s: float) -> SetAside | None:
        """Return who must not wait until another sequence ends, and which one makes way.

        A client without a row gets one of the client that has most, unless that is its only one. A
        request without a row gets one of a request of its client that has more than half of what
        the client may have. As many as there are rows may be set aside at a time.
        """
        rows = _RowsInUse.of(self._active())
        poor = [c for c in self.waiting.clients if c not in rows.by_client] if self._is_full else []
        large = [s.client for s in self.running if rows.by_group[id(s.group)] > self._share]
        candidates = [c for c in dict.fromkeys([*poor, *large]) if c in self.waiting.clients]
        if not candidates:
            return None
        if sum(sequence.kv is not None for sequence in self.waiting) >= self._limits.max_num_seqs:
            return None
        for newcomer in islice(self.waiting.first_of_each(candidates), MAX_OVERTAKEN):
            able = self._able_to_make_way(newcomer, rows)
            if able and self._way_in(newcomer, {}) is not _Way.WAIT:
                victim = min(able, key=rows.cost_of_losing)
                return SetAside(newcomer, victim, self.running.index(victim), now_s)
        return None

    def _able_to_make_way(self, newcomer: Sequence, rows: _RowsInUse) -> list[Sequence]:
        """Return the running sequences that may be set aside for it, the last ones first."""
        client, running = newcomer.client, self.running[::-1]
        if id(newcomer.group) in rows.by_group:
            return []
        if client in rows.by_client:
            has_room = not self._is_full and rows.by_client[client] < self._max_per_client
            own = [s for s in running if s.client == client]
            return [] if has_room else [s for s in own if rows.by_group[id(s.group)] > self._share]
        richest, count = rows.by_client.most_common(1)[0]
        is_rich = self._is_full and count > 1
        return [s for s in running if s.client == richest] if is_rich else []

    def set_aside(self, sequence: Sequence) -> list[RowMove]:
        """Let a running sequence, which has its `kv`, wait; returns what `retire` returns."""
        self.waiting.put_back(sequence)
        return self.retire([sequence])

    def _active(self) -> list[Sequence]:
        return [*self.running, *(prompt.sequence for prompt in self.prefilling)]

    @property
    def _is_full(self) -> bool:
        return self.num_active >= self._max_active

    def admit(self, now_s: float, newcomer: Sequence | None = None) -> Prefill | None:
        """Move sequences from the queue into free rows, in turns, `newcomer` first.

        Only a request that waits for a row for its long prompt, or for a long prompt that it
        shares, is overtaken. A batch of prefills always takes the first.
        """
        admission = _Admission()
        max_batch_tokens = self._limits.max_chunk_tokens
        if self.num_active == 0:
            max_batch_tokens = self._limits.lone_pass_tokens
            self._max_active = self._limits.max_num_seqs
            self._calm_steps = 0
        # By group: the sequence to fork from; None while a long prompt is entering.
        holders: dict[int, Sequence | None] = {id(p.sequence.group): None for p in self.prefilling}
        holders |= {id(s.group): s for s in self.running}
        num_rows = _RowsInUse.of(self._active()).by_client
        overtaken: set[int] = set()
        while len(overtaken) < MAX_OVERTAKEN:
            if self.num_active + admission.num_in_rows >= self._max_active:
                break
            sequence = newcomer or self.waiting.next(num_rows, self._max_per_client, overtaken)
            newcomer = None
            if sequence is None:
                break
            way = self._way_in(sequence, holders)
            if way is _Way.PREFILL and not _fits(admission.prefills, sequence, max_batch_tokens):
                break
            if way is _Way.WAIT:
                overtaken.add(id(sequence.group))
                continue
            self.waiting.take(sequence)
            num_rows[sequence.client] += 1
            self._place(sequence, way, admission, holders)
        return self._let_in(admission, now_s)

    def _let_in(self, admission: _Admission, now_s: float) -> Prefill | None:
        """Give them the rows behind the running ones; None where there is nobody."""
        if not admission.num_in_rows and not admission.long_prompts:
            return None
        first_row, in_rows = len(self.running), admission.in_rows
        self.running += in_rows
        work = Prefill(
            first_row=first_row,
            in_rows=in_rows,
            prefills=tuple(admission.prefills),
            restores=tuple(admission.restores),
            forks=tuple((fork, self.running.index(holder)) for fork, holder in admission.forks),
            resumed=tuple(admission.resumed),
            long_prompts=tuple(admission.long_prompts),
            started_s=now_s,
        )
        for sequence in work.started:
            sequence.started_s = now_s
        for prompt in work.long_prompts:
            prompt.sequence.started_s = now_s
        return work

    def _way_in(self, sequence: Sequence, holders: dict[int, Sequence | None]) -> _Way:
        group = sequence.group
        if sequence.kv is not None:
            return _Way.RESUME
        if id(group) in holders:
            return _Way.WAIT if holders[id(group)] is None else _Way.FORK
        num_tokens = len(group.request.prompt_token_ids)
        num_cached = self._count_cached(group)
        if num_cached == num_tokens:
            return _Way.RESTORE
        if num_cached == 0 and num_tokens <= self._limits.max_chunk_tokens:
            return _Way.PREFILL
        return _Way.CHUNKS if self._has_free_row(sequence.client) else _Way.WAIT

    def _has_free_row(self, client: str) -> bool:
        """Say whether a long prompt may enter; the last row is for a client that has none."""
        has_none = all(prompt.sequence.client != client for prompt in self.prefilling)
        return len(self._free_rows) > (0 if has_none else 1)

    def _place(
        self,
        sequence: Sequence,
        way: _Way,
        admission: _Admission,
        holders: dict[int, Sequence | None],
    ) -> None:
        group_id = id(sequence.group)
        if way is _Way.FORK:
            holder = holders[group_id]
            assert holder is not None
            admission.forks.append((sequence, holder))
        elif way is _Way.RESUME:
            admission.resumed.append(sequence)
            holders.setdefault(group_id, sequence)
        elif way is _Way.CHUNKS:
            admission.long_prompts.append(LongPrompt(sequence, self._free_rows.pop(0)))
            self.prefilling.append(admission.long_prompts[-1])
            holders[group_id] = None
        else:
            started = admission.restores if way is _Way.RESTORE else admission.prefills
            started.append(sequence)
            holders[group_id] = sequence

    def next_long_prompt(self) -> LongPrompt | None:
        """Return the long prompt whose turn it is: of another client than the last one, if any."""
        if not self.prefilling:
            return None
        last = self.prefilling[-1].sequence.client
        others = (prompt for prompt in self.prefilling if prompt.sequence.client != last)
        prompt = next(others, self.prefilling[0])
        self.prefilling.remove(prompt)
        self.prefilling.append(prompt)
        return prompt

    def start(self, prompt: LongPrompt) -> int:
        """Let the sequence of a complete long prompt run; returns the row to copy it to."""
        self._leave(prompt)
        self.running.append(prompt.sequence)
        return len(self.running) - 1

    def _leave(self, prompt: LongPrompt) -> None:
        self.prefilling.remove(prompt)
        self._free_rows.append(prompt.row)

    def remove_waiting(self, group_ids: Set[int]) -> list[Sequence]:
        """Take the sequences of these groups (by `id`) that do not run out; return them."""
        entering = [p for p in self.prefilling if id(p.sequence.group) in group_ids]
        for prompt in entering:
            self._leave(prompt)
        return [*(p.sequence for p in entering), *self.waiting.remove(group_ids)]

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
