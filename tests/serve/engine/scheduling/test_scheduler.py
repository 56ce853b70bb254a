"""What runs next, and what ends: without a model and without threads."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from serve.engine.mail import Inbox, Outbox
from serve.engine.rows import RowLimits, Rows
from serve.engine.scheduler import NOT_FINITE, OUT_OF_MEMORY, Scheduler
from serve.engine.scoring import ScoringJob, ScoringRequest
from serve.engine.sequence import (
    Chunk,
    Decode,
    FinishReason,
    GenerationRequest,
    OutOfMemory,
    PassResult,
    Prefill,
    RowMove,
    Score,
    SequenceGroup,
    SetAside,
    Work,
    make_group,
    make_sequences,
)
from serve.engine.stats import StepStats
from serve.errors import EngineFailedError
from serve.sampling.params import SamplingParams
from serve.sampling.sampler import SampledBatch
from tests.support.engines import CountingObserver, EventReader, StoppedClock

EOS = 2


class Scheduled:
    """A scheduler, and a model that says the token 9 to everybody."""

    def __init__(self, max_num_seqs: int = 4, max_chunk_tokens: int = 8) -> None:
        self.clock, self.outbox = StoppedClock(), Outbox()
        self.inbox = Inbox("model", max_num_seqs, 1000)
        self.observer = CountingObserver()
        rows = Rows(RowLimits(max_num_seqs, max_chunk_tokens, max_chunk_tokens))
        stats = StepStats(self.observer)
        self.scheduler = Scheduler(rows, frozenset({EOS}), self.outbox, stats, self.clock)
        self.groups: list[SequenceGroup] = []

    def submit(
        self, request_id: str = "r", prompt_length: int = 3, deadline_s: float | None = None,
        client: str = "", **sampling: Any,
    ) -> EventReader:  # fmt: skip
        params = SamplingParams(**{"max_tokens": 50, **sampling})
        request = GenerationRequest(
            request_id, (1,) * prompt_length, params, deadline_s=deadline_s, client=client
        )
        reader = EventReader()
        self.groups.append(make_group(request, reader, self.clock()))
        self.scheduler.add(self.groups[-1], list(make_sequences(self.groups[-1])))
        return reader

    def score(self, request_id: str = "s", deadline_s: float | None = None) -> ScoringJob:
        job = ScoringJob(ScoringRequest(request_id, (1,), ((2, 3),), deadline_s=deadline_s))
        self.scheduler.add_scoring(job)
        return job

    def step(self, *results: PassResult | None) -> list[Work]:
        """Do a step's work, with these results where they are not None; return the work."""
        given, done = iter(results), []
        self.scheduler.end_due()
        for work in self.scheduler.schedule():
            self.scheduler.update(work, next(given, None) or answer(work))
            done.append(work)
            self.scheduler.end_due()
        self.outbox.flush(self.inbox)
        return done

    def kinds(self, num_steps: int) -> list[list[type]]:
        return [[type(work) for work in self.step()] for _ in range(num_steps)]


def answer(work: Work, token_id: int = 9) -> PassResult:
    if isinstance(work, Decode):
        sequences = work.sequences
    elif isinstance(work, Prefill):
        sequences = work.started
    elif isinstance(work, SetAside):
        work.victim.kv = object()  # type: ignore[assignment]
        return PassResult()
    else:
        return PassResult(num_rows=1)  # a chunk that is not the last, of scoring too
    return drawn(sequences, [token_id] * len(sequences))


def drawn(sequences: tuple[Any, ...], token_ids: list[int], nan: int | None = None) -> PassResult:
    count = len(sequences)
    is_finite = [row != nan for row in range(count)]
    batch = SampledBatch(token_ids, [0.0] * count, [0.0] * count, is_finite, [()] * count)
    return PassResult(count, 0.0, 0.0, sequences, batch if count else None)


# What is next


def test_schedule_decodes_and_then_runs_one_kind_of_pass_in_turns() -> None:
    model = Scheduled()
    model.submit(prompt_length=20)
    model.score()
    model.submit(num_samples=3)
    assert model.kinds(2) == [[Score], [Prefill]]
    kinds = model.kinds(6)
    assert all(of_step[0] is Decode and len(of_step) == 2 for of_step in kinds)
    assert [of_step[1] for of_step in kinds] == [Chunk, Score] * 3


def test_schedule_ends_where_there_is_nothing_to_do() -> None:
    model = Scheduled()
    assert model.step() == []
    assert model.scheduler.is_empty


def test_last_chunk_lets_its_sequence_run() -> None:
    model = Scheduled()
    model.submit(prompt_length=20)
    model.step()
    sequence = model.scheduler.rows.prefilling[0].sequence
    [chunk] = model.step(drawn((sequence,), [9]))
    assert isinstance(chunk, Chunk) and chunk.target_row == 0
    assert model.scheduler.rows.running == [sequence] and sequence.token_ids == [9]


def full_rows() -> tuple[Scheduled, EventReader]:
    """A client has both rows, and another waits."""
    model = Scheduled(max_num_seqs=2)
    many = model.submit("many", num_samples=4)
    model.step()
    model.submit("other", client="other")
    return model, many


def test_sequence_is_set_aside_before_the_one_that_needs_its_row_enters() -> None:
    model, many = full_rows()
    decode, aside, prefill = model.step()
    assert isinstance(aside, SetAside) and isinstance(prefill, Prefill)
    assert prefill.started == (aside.newcomer,) and aside.newcomer.client == "other"
    assert isinstance(decode, Decode) and aside.victim in decode.sequences
    assert aside.victim in list(model.scheduler.rows.waiting) and not many.endings


def test_nobody_is_set_aside_without_memory() -> None:
    model, many = full_rows()
    running = list(model.scheduler.rows.running)
    model.step(None, PassResult(out_of_memory=OutOfMemory()))
    assert model.scheduler.rows.running == running and not many.endings


def test_newcomer_that_is_cancelled_meanwhile_is_not_let_in() -> None:
    model, _ = full_rows()
    for work in model.scheduler.schedule():
        model.scheduler.update(work, answer(work))
        if isinstance(work, SetAside):
            model.scheduler.end_request("other", FinishReason.CANCELLED)
            model.scheduler.end_due()
    assert {s.client for s in model.scheduler.rows.running} == {""}
    assert model.observer.reasons == [FinishReason.CANCELLED]


# What ends


def test_cancelled_request_ends_whether_it_runs_or_waits() -> None:
    model = Scheduled(max_num_seqs=3)
    reader, other = model.submit(num_samples=5), model.submit("other", client="other")
    model.step()
    model.scheduler.end_request("r", FinishReason.CANCELLED)
    model.step()
    assert reader.reasons == [FinishReason.CANCELLED] * 5 and not other.endings
    assert len(model.scheduler.rows.running) == 1


def test_end_of_a_running_sequence_moves_the_last_row_once() -> None:
    model = Scheduled(max_chunk_tokens=100)
    model.submit("a", prompt_length=5)
    model.submit("b", prompt_length=6)
    model.step()
    model.scheduler.end_request("a", FinishReason.CANCELLED)
    model.scheduler.end_due()
    assert list(model.scheduler.take_moves()) == [RowMove(source=1, target=0, length=6)]
    assert list(model.scheduler.take_moves()) == []


@pytest.mark.parametrize("is_running", [False, True])
def test_request_past_its_deadline_ends_alone(is_running: bool) -> None:
    model = Scheduled()
    reader, timeless = model.submit(deadline_s=101.0), model.submit("t")
    job = model.score(deadline_s=101.0)
    if is_running:
        assert model.kinds(2) == [[Score], [Prefill]]
    model.clock.now_s = 101.0
    model.step()
    assert reader.reasons == [FinishReason.DEADLINE] and not timeless.endings
    assert len(reader.tokens[0]) == is_running
    assert isinstance(job.future.exception(0), TimeoutError)


def test_deadline_of_an_earlier_request_spares_a_later_one_of_the_same_id() -> None:
    model = Scheduled()
    model.submit(deadline_s=101.0, max_tokens=1)
    model.step()
    reader = model.submit(deadline_s=200.0)
    model.clock.now_s = 150.0
    model.step()
    assert not reader.endings


def test_row_without_finite_logits_ends_alone() -> None:
    model = Scheduled()
    bad, good = model.submit("bad"), model.submit("good")
    model.step()
    model.step(drawn(tuple(model.scheduler.rows.running), [9, 9], nan=0))
    assert bad.reasons == [FinishReason.ERROR] and bad.endings[0].error == NOT_FINITE
    assert len(bad.tokens[0]) == 1 and len(good.tokens[0]) == 2
    assert model.observer.generation_tokens == 3


def test_token_that_ends_a_sequence_is_its_last() -> None:
    model = Scheduled()
    stopped, goes_on = model.submit("a"), model.submit("b", ignore_eos=True)
    model.step()
    model.step(drawn(tuple(model.scheduler.rows.running), [EOS, EOS]))
    assert stopped.reasons == [FinishReason.STOP] and stopped.completions == [(9, EOS)]
    assert not goes_on.endings


def test_everything_ends_once_also_when_a_step_broke_off() -> None:
    model = Scheduled(max_num_seqs=2)
    readers = [model.submit("a", max_tokens=1), model.submit("b"), model.submit("c", 20)]
    job = model.score()
    model.step()
    for work in model.scheduler.schedule():
        model.scheduler.update(work, answer(work))
        break
    model.scheduler.end_all(FinishReason.ERROR, "it failed")
    model.scheduler.end_all(FinishReason.SHUTDOWN, "")
    model.outbox.flush(model.inbox)
    assert [len(reader.endings) for reader in readers] == [1, 1, 1]
    assert readers[2].endings[0].error == "it failed"
    assert isinstance(job.future.exception(0), EngineFailedError)
    assert model.scheduler.is_empty and not list(model.scheduler.take_moves())


# Memory that runs out


def test_decode_step_without_memory_ends_the_youngest_and_lets_nobody_in() -> None:
    model = Scheduled()
    old = model.submit("old")
    model.step()
    model.clock.now_s += 1
    young = model.submit("young")
    model.step()
    late = model.submit("late")
    [decode] = model.step(PassResult(out_of_memory=OutOfMemory((model.groups[1],))))
    assert decode.expendable() == (model.groups[1],)
    assert young.endings[0].error == OUT_OF_MEMORY
    assert not old.endings and not late.tokens


def test_prompt_without_memory_ends_its_request_and_the_others_start() -> None:
    model = Scheduled()
    heavy, light = model.submit("heavy", num_samples=2), model.submit("light")
    work = next(model.scheduler.schedule())
    assert isinstance(work, Prefill)
    started = tuple(s for s in work.started if s.group is model.groups[1])
    result = drawn(started, [9])
    lacking = OutOfMemory((model.groups[0],))
    model.scheduler.update(
        work, PassResult(1, 0.0, 0.0, started, result.batch, out_of_memory=lacking)
    )
    model.outbox.flush(model.inbox)
    assert [event.error for event in heavy.endings.values()] == [OUT_OF_MEMORY] * 2
    assert light.tokens == {0: [9]} and not light.endings


def test_scoring_without_memory_fails_alone() -> None:
    model = Scheduled()
    bad, good = model.score("a"), model.score("b")
    model.step(PassResult(out_of_memory=OutOfMemory()))
    assert str(bad.future.exception(0)) == OUT_OF_MEMORY
    assert model.scheduler.scoring.first is good and not good.future.done()


def test_importing_the_scheduler_loads_no_runtime() -> None:
    code = (
        "import sys, serve.engine.scheduler;"
        "print(sorted({'torch', 'onnxruntime', 'grpc', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
