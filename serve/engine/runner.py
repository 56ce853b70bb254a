"""The model's side of a step: passes, what enters and leaves its rows, and memory that runs out.

It knows of no queue: `ModelRunner.run` does one `Work`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from serve.engine.prefix_cache import PrefixCache, TokenizedPrompt, chunk_size
from serve.engine.sequence import (
    Chunk,
    Decode,
    LongPrompt,
    OutOfMemory,
    PassResult,
    Prefill,
    RowMove,
    Score,
    SequenceGroup,
    SetAside,
    Work,
)
from serve.engine.sequence import Sequence as Sample
from serve.engine.watchdog import Watchdog
from serve.models.backend import Backend, is_out_of_memory
from serve.sampling.sampler import Sampler

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class PromptEntry:
    """A prompt on its way into `row`: so many of its tokens are there, so many were cached.

    `logits`, `(V,)`, are those behind the prompt; None until it is complete. Of `is_finite` False
    some of its keys and values are NaN.
    """

    prompt: TokenizedPrompt
    row: int
    num_entered: int = 0
    num_cached: int = 0
    logits: torch.Tensor | None = None
    is_finite: bool = True


class Prefiller:
    """Runs prompts through `backend`, or copies what is cached of them."""

    def __init__(self, backend: Backend, cache: PrefixCache) -> None:
        self.backend = backend
        self._cache = cache

    def begin(self, prompt: TokenizedPrompt, row: int) -> PromptEntry:
        """Restore into `row` what is cached of the prompt."""
        num_cached, logits = self._cache.restore(prompt, row)
        return PromptEntry(prompt, row, num_cached, num_cached, logits)

    def advance(self, entry: PromptEntry, max_tokens: int) -> None:
        """Run the next chunk, of `max_tokens`, of a prompt that is not complete.

        What fails changes nothing, and may be tried again.
        """
        assert entry.logits is None, "the prompt is complete"
        token_ids = entry.prompt.token_ids
        start = entry.num_entered
        stop = start + chunk_size(len(token_ids) - start, max_tokens)
        logits = self.backend.forward(entry.row, [token_ids[start:stop]], [start])
        # Whatever is NaN in front of a token makes its logits NaN.
        entry.is_finite &= bool(logits.isfinite().all())
        if stop == len(token_ids):
            entry.logits = self._keep(entry.prompt, entry.row, logits[0])
        entry.num_entered = stop

    def run_batch(self, first_row: int, prompts: Sequence[TokenizedPrompt]) -> list[PromptEntry]:
        """Run whole prompts in one pass into the rows from `first_row` on."""
        token_ids = [prompt.token_ids for prompt in prompts]
        logits = self.backend.forward(first_row, token_ids, [0] * len(prompts))
        return [
            PromptEntry(prompt, row, len(prompt.token_ids), 0, self._keep(prompt, row, row_logits))
            for row, (prompt, row_logits) in enumerate(zip(prompts, logits, strict=True), first_row)
        ]

    def _keep(self, prompt: TokenizedPrompt, row: int, logits: torch.Tensor) -> torch.Tensor:
        """Cache a complete prompt; returns logits that outlive the backend's next pass."""
        kept = logits.clone()
        if bool(kept.isfinite().all()):
            store = partial(self._cache.store, prompt, row, kept)
            unless_out_of_memory(store, lambda error: self._cache.clear())
        return kept


class ModelRunner:
    """Runs what it is given; every pass takes at most `max_pass_tokens` prompt tokens.

    A pass that runs out of memory is tried once more: without the prefix cache, which lies in the
    same memory, and of prompts and scorings only half as much of one at a time. If that is still
    too much, the result names the requests that must end; nothing that others need has changed.
    """

    def __init__(
        self,
        backend: Backend,
        sampler: Sampler,
        prefix_cache: PrefixCache,
        watchdog: Watchdog,
        *,
        max_pass_tokens: int,
        name: str = "engine",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend = backend
        self.sampler = sampler
        self.prefix_cache = prefix_cache
        self.max_pass_tokens = max_pass_tokens
        self.watchdog = watchdog
        self._name = name
        self.clock = clock
        self._prefiller = Prefiller(backend, prefix_cache)
        # Long prompts that are entering, or were on their way when they ended, by row.
        self._entries: dict[int, PromptEntry] = {}
        # Rows with keys or values that are not finite: whoever enters next must not see them.
        self._tainted_rows: set[int] = set()
        self._run: dict[type[Work], Callable[[Any], PassResult]] = {
            Decode: self._decode,
            SetAside: self._set_aside,
            Prefill: self._prefill,
            Chunk: self._advance,
            Score: self._score,
        }

    def run(self, work: Work) -> PassResult:
        """Do some work: a pass of the model, and a token for each sequence that is due one."""
        return self._run[type(work)](work)

    def count_cached(self, group: SequenceGroup) -> int:
        """Return how much of a prompt need not be computed; all of it: nor the logits behind it."""
        return self.prefix_cache.count_cached(group.prompt)

    def move_rows(self, moves: Iterable[RowMove]) -> None:
        """Copy rows over others, in order."""
        for move in moves:
            self._clean(move.target)
            if move.source in self._tainted_rows:
                self._tainted_rows.add(move.target)
            self.backend.copy_kv(move.source, move.target, move.length)

    def distrust_rows(self) -> None:
        """Have every row scrubbed before somebody else uses it.

        What a pass that failed, or whose logits nobody saw, has written may not be finite.
        """
        self._tainted_rows.update(range(self.backend.info.rows.num_rows))

    # -- kinds of work ----------------------------------------------------------------------

    def _decode(self, work: Decode) -> PassResult:
        def forward(_: int) -> torch.Tensor:
            newest = [s.token_ids[-1:] for s in work.sequences]
            past_lengths = [s.num_cached_tokens for s in work.sequences]
            return self.backend.forward(0, newest, past_lengths)

        logits, times = self._pass(lambda: self._attempt(work, forward))
        if isinstance(logits, OutOfMemory):
            return PassResult(out_of_memory=logits)
        return self._draw(work, work.sequences, range(len(work.sequences)), logits, times)

    def _set_aside(self, work: SetAside) -> PassResult:
        """Keep what is in a running sequence's row, if there is memory for that."""
        kv = unless_out_of_memory(
            lambda: self.backend.read_kv(work.row, 0, work.victim.num_cached_tokens),
            lambda error: logger.warning("out of memory, nobody is set aside: %s", error),
        )
        if isinstance(kv, OutOfMemory):
            return PassResult(out_of_memory=kv)
        work.victim.kv = kv
        return PassResult()

    def _prefill(self, work: Prefill) -> PassResult:
        """Bring prompts into rows, and draw their first tokens; long ones only begin."""
        for prompt in work.long_prompts:
            self._begin(prompt)
        if not work.in_rows:
            return PassResult()
        too_large, times = self._pass(lambda: self._fill_rows(work))
        lacking = OutOfMemory(tuple(too_large)) if too_large else None
        started = dict(enumerate(work.started, work.first_row))
        for row in [r for r, s in started.items() if any(s.group is g for g in too_large)]:
            del started[row]
        if not started:
            return PassResult(out_of_memory=lacking)
        logits = torch.stack([s.group.take_logits() for s in started.values()])
        result = self._draw(work, tuple(started.values()), started, logits, times)
        is_short = lacking is not None and result.out_of_memory is None
        return replace(result, out_of_memory=lacking) if is_short else result

    def _advance(self, work: Chunk) -> PassResult:
        """Run a long prompt's next chunk; behind the last one, draw its sequence's first token."""
        sequence = work.prompt.sequence
        entry = self._entries[work.prompt.row]
        done, times = self._pass(lambda: self._attempt(work, lambda n: self._enter(work, entry, n)))
        if isinstance(done, OutOfMemory):
            return PassResult(out_of_memory=done)
        if entry.logits is None:
            return PassResult(1, *times)
        del self._entries[entry.row]
        if not entry.is_finite:
            self._tainted_rows.add(entry.row)
        _complete(sequence.group, entry)
        logits = torch.stack([sequence.group.take_logits()])
        return self._draw(work, (sequence,), (work.target_row,), logits, times)

    def _score(self, work: Score) -> PassResult:
        """Run a scoring request's next chunk."""
        job = work.job
        rows = self.backend.info.rows.scoring

        def advance(max_tokens: int) -> None:
            job.advance(self._prefiller, rows.start, len(rows), max_tokens)

        if not job.is_begun:
            for row in rows:
                self._clean(row)
        done, times = self._pass(lambda: self._attempt(work, advance))
        if isinstance(done, OutOfMemory):
            return PassResult(out_of_memory=done)
        if not job.is_finite:
            self._tainted_rows.update(rows)
        return PassResult(1, *times)

    # -- prompts into rows ------------------------------------------------------------------

    def _begin(self, prompt: LongPrompt) -> None:
        """Restore what is cached of a long prompt; its chunks are the rest."""
        previous = self._entries.get(prompt.row)
        if previous is not None and not previous.is_finite:
            self._tainted_rows.add(prompt.row)
        self._clean(prompt.row)
        self._entries[prompt.row] = self._prefiller.begin(prompt.sequence.group.prompt, prompt.row)

    def _enter(self, work: Chunk, entry: PromptEntry, max_tokens: int) -> None:
        """Run a chunk, and copy the prompt to where its sequence will run when it is complete."""
        if entry.logits is None:
            self._prefiller.advance(entry, max_tokens)
        if entry.logits is not None:
            self._clean(work.target_row)
            self.backend.copy_kv(entry.row, work.target_row, entry.num_entered)

    def _fill_rows(self, work: Prefill) -> list[SequenceGroup]:
        """Bring the prompts of those who start into their rows.

        What is cached is restored before new prompts may push it out of the cache. Returns those
        whose prompt alone takes more memory than there is.
        """
        first_row, too_large = work.first_row, []
        for row in range(first_row, first_row + len(work.in_rows)):
            self._clean(row)
        first_restored = first_row + len(work.prefills)
        for row, sequence in enumerate(work.restores, first_restored):
            _complete(sequence.group, self._prefiller.begin(sequence.group.prompt, row))
        if work.prefills:
            entries = self._run_prompts(first_row, [s.group.prompt for s in work.prefills])
            for sequence, entry in zip(work.prefills, entries, strict=True):
                if isinstance(entry, OutOfMemory):
                    too_large.append(sequence.group)
                else:
                    _complete(sequence.group, entry)
        first_fork = first_restored + len(work.restores)
        # Before the forks, which may copy from them.
        for row, sequence in enumerate(work.resumed, first_fork + len(work.forks)):
            assert sequence.kv is not None, "it was not set aside"
            self.backend.write_kv(row, 0, sequence.kv)
            sequence.kv = None
        for row, (fork, source_row) in enumerate(work.forks, first_fork):
            self.backend.copy_kv(source_row, row, len(fork.prompt_token_ids))
        return too_large

    def _run_prompts(
        self, first_row: int, prompts: Sequence[TokenizedPrompt]
    ) -> Sequence[PromptEntry | OutOfMemory]:
        """Run whole prompts in one pass, or else one by one."""

        def run(max_tokens: int) -> Sequence[PromptEntry | OutOfMemory]:
            if max_tokens == self.max_pass_tokens:
                return self._prefiller.run_batch(first_row, prompts)
            return [
                self._run_alone(PromptEntry(prompt, row), max_tokens)
                for row, prompt in enumerate(prompts, first_row)
            ]

        return self.try_twice(run)

    def _run_alone(self, entry: PromptEntry, max_tokens: int) -> PromptEntry | OutOfMemory:
        def run() -> PromptEntry:
            while entry.logits is None:
                # Each of these passes is a new one, and has its second try.
                self.try_twice(lambda n: self._prefiller.advance(entry, min(n, max_tokens)))
            return entry

        return unless_out_of_memory(
            run, lambda error: logger.warning("out of memory on one prompt alone: %s", error)
        )

    def _clean(self, row: int) -> None:
        """Prepare a row for another sequence."""
        if row in self._tainted_rows:
            self.backend.scrub_kv(row)
            self._tainted_rows.remove(row)

    # -- tokens, time and memory ------------------------------------------------------------

    def _draw(
        self,
        work: Decode | Prefill | Chunk,
        sequences: tuple[Sample, ...],
        rows: Iterable[int],
        logits: torch.Tensor,
        times: tuple[float, float],
    ) -> PassResult:
        """Draw a token for each sequence from its logits, `(B, V)`."""
        with self.watchdog.unowned():  # here a model on CUDA is waited for
            batch = self._attempt(
                work, lambda _: self.sampler.sample(logits, sequences), "has no memory to sample in"
            )
        if isinstance(batch, OutOfMemory):
            return PassResult(len(sequences), *times, sequences, out_of_memory=batch)
        for index, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
            if not batch.is_finite[index]:
                self._tainted_rows.add(row)
            if sequence.group.request.keep_logits:
                sequence.logits.append(logits[index].cpu().clone())
        return PassResult(len(sequences), *times, sequences, batch)

    def _pass(self, run: Callable[[], T]) -> tuple[T, tuple[float, float]]:
        """Have the model work in this engine's turn; also returns for how long, and until when."""
        started_s = self.clock()
        with self.watchdog.turn():
            done = run()
        ended_s = self.clock()
        return done, (ended_s - started_s, ended_s)

    def _attempt(
        self,
        work: Decode | Prefill | Chunk | Score,
        run: Callable[[int], T],
        text: str = "is out of memory",
    ) -> T | OutOfMemory:
        """Return what `run` does in two tries, or what must end because there is no memory."""
        return unless_out_of_memory(
            lambda: self.try_twice(run),
            lambda error: logger.exception("the %s engine %s", self._name, text),
            work.expendable,
        )

    def try_twice(self, run: Callable[[int], T]) -> T:
        """Call `run` with the tokens of a pass; when memory runs out, make room, and with half."""
        done = unless_out_of_memory(
            lambda: run(self.max_pass_tokens),
            lambda error: logger.warning("out of memory, trying again with less: %s", error),
        )
        if not isinstance(done, OutOfMemory):
            return done
        # Not in the except: a traceback holds what the failed pass had.
        self.distrust_rows()
        self.prefix_cache.clear()
        if torch.device(self.backend.info.device).type == "cuda":
            torch.cuda.empty_cache()
        return run(max(self.max_pass_tokens // 2, 2))


def unless_out_of_memory(
    run: Callable[[], T],
    report: Callable[[Exception], None],
    expendable: Callable[[], tuple[SequenceGroup, ...]] = tuple,
) -> T | OutOfMemory:
    """Return what `run` returns, or `OutOfMemory` of what is expendable; `report` is told why."""
    try:
        return run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        report(error)
    return OutOfMemory(expendable())


def _complete(group: SequenceGroup, entry: PromptEntry) -> None:
    group.prompt_logits = entry.logits
    if not group.is_prompt_counted:
        group.num_cached_tokens = entry.num_cached
