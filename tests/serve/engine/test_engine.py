"""One engine on a fake model: every sequence ends exactly once, whatever happens.

Most tests drive `Engine.step` by hand; the thread is for the tests of the thread.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from serve.engine.engine import MAX_FAILED_STEPS, Engine
from serve.engine.prefix_cache import BLOCK_TOKENS
from serve.engine.scoring import ScoringRequest
from serve.engine.sequence import (
    Event,
    FinishedEvent,
    FinishReason,
    GenerationRequest,
    TokenEvent,
    make_group,
    make_sequences,
)
from serve.engine.stats import EngineObserver
from serve.engine.turns import StepArbiter
from serve.errors import EngineFailedError, EngineStoppedError, QueueFullError
from serve.sampling.params import SamplingParams
from serve.sampling.sampler import Sampler

PROMPT = (5, 6, 7)
MakeEngine = Callable[..., Engine]


class Reader:
    """A sink, and what it was told; reading it checks the order of events.

    It checks late, because the engine logs what a sink raises and goes on.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, events: list[Event]) -> None:
        self.events += events

    @property
    def tokens(self) -> dict[int, list[int]]:
        """Token ids by sample, which must come from position 0 on without a gap."""
        tokens: defaultdict[int, list[int]] = defaultdict(list)
        for event in self.events:
            if isinstance(event, TokenEvent):
                assert event.position == len(tokens[event.index])
                tokens[event.index].append(event.token_id)
        return tokens

    @property
    def endings(self) -> dict[int, FinishedEvent]:
        """Terminal events by sample: one each, the last, with the tokens that were emitted."""
        endings: dict[int, FinishedEvent] = {}
        for event in self.events:
            assert event.index not in endings, "an event after the terminal one"
            if isinstance(event, FinishedEvent):
                assert list(event.token_ids) == self.tokens[event.index]
                assert len(event.logprobs) == len(event.token_ids)
                assert len(event.processed_logprobs) == len(event.token_ids)
                endings[event.index] = event
        return endings

    @property
    def reasons(self) -> list[FinishReason]:
        return [self.endings[index].finish_reason for index in sorted(self.endings)]

    @property
    def completions(self) -> list[tuple[int, ...]]:
        return [self.endings[index].token_ids for index in sorted(self.endings)]


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Observed(EngineObserver):
    def __init__(self) -> None:
        self.prompt_tokens = self.cached_tokens = self.generation_tokens = 0
        self.reasons: list[FinishReason] = []
        self.phases: list[str] = []
        self.intervals = 0

    def on_step(self, phase: str, batch_size: int, step_s: float, host_s: float) -> None:
        assert 0 <= host_s <= step_s
        self.phases.append(phase)

    def on_prompt(self, num_tokens: int, num_cached: int) -> None:
        self.prompt_tokens += num_tokens
        self.cached_tokens += num_cached

    def on_tokens(self, num_tokens: int) -> None:
        self.generation_tokens += num_tokens

    def on_token_interval(self, itl_s: float, count: int) -> None:
        self.intervals += count

    def on_finished(self, finish_reason: FinishReason) -> None:
        self.reasons.append(finish_reason)


@pytest.fixture
def make_engine(make_backend: Any) -> MakeEngine:
    def make(*, max_num_seqs: int = 4, max_model_len: int = 64, **settings: Any) -> Engine:
        backend = make_backend(max_num_seqs=max_num_seqs, max_model_len=max_model_len)
        settings = {"eos_token_ids": frozenset({backend.EOS}), **settings}
        return Engine(backend, **settings)

    return make


def submit(
    engine: Engine, request_id: str = "r", prompt: tuple[int, ...] = PROMPT, **settings: Any
) -> Reader:
    names = {"deadline_s", "make_stop_check", "num_top_logprobs", "cache_salt"}
    fields = names & settings.keys()
    request = {name: settings.pop(name) for name in fields}
    params = SamplingParams(**{"max_tokens": 8, **settings})
    reader = Reader()
    engine.submit(GenerationRequest(request_id, prompt, params, **request), reader)
    return reader


def run(engine: Engine, max_steps: int = 500) -> None:
    """Step until nothing is left; `load` must say so."""
    for _ in range(max_steps):
        engine.core.step()
        if is_idle(engine):
            return
    raise AssertionError(f"still busy: {engine.load()}")


def is_idle(engine: Engine) -> bool:
    load = engine.load()
    return (load.num_running, load.num_waiting) == (0, 0)


def slow_completion(backend: Any, index: int, params: SamplingParams) -> tuple[int, ...]:
    """Decode one sample alone, without cache, rows or engine."""
    group = make_group(GenerationRequest("r", PROMPT, params), lambda events: None, 0.0)
    sequence = list(make_sequences(group))[index]
    eos = frozenset({backend.EOS})
    while True:
        logits = backend.logits_after([*PROMPT, *sequence.token_ids])
        batch = Sampler(eos).sample(logits[None], [sequence])
        sequence.append(batch.token_ids[0], batch.logprobs[0], batch.processed_logprobs[0])
        if sequence.finish_reason(eos):
            return tuple(sequence.token_ids)


# What comes out


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_num_seqs", [1, 3, 8])
def test_completions_are_those_of_decoding_alone(
    make_engine: MakeEngine, max_num_seqs: int, temperature: float
) -> None:
    engine = make_engine(max_num_seqs=max_num_seqs)
    params = SamplingParams(num_samples=6, max_tokens=20, temperature=temperature, seed=3)
    reader = Reader()
    engine.submit(GenerationRequest("r", PROMPT, params), reader)
    run(engine)
    expected = [slow_completion(engine.core.runner.backend, index, params) for index in range(6)]
    assert reader.completions == expected


def test_same_seed_gives_the_same_tokens_alone_and_among_others(make_engine: MakeEngine) -> None:
    engine = make_engine()
    alone = submit(engine, num_samples=2, seed=9, max_tokens=15)
    run(engine)
    crowd = [submit(engine, f"o{i}", (i + 10,) * (i + 1), seed=i, max_tokens=i + 2)
             for i in range(9)]  # fmt: skip
    engine.core.step()
    again = submit(engine, num_samples=2, seed=9, max_tokens=15)
    run(engine)
    assert again.completions == alone.completions
    assert all(len(reader.endings) == 1 for reader in crowd)


def test_more_samples_than_rows_all_end(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2)
    reader = submit(engine, num_samples=7)
    run(engine)
    assert sorted(reader.endings) == list(range(7))


def test_prompt_is_prefilled_once_for_all_its_samples(make_engine: MakeEngine) -> None:
    engine = make_engine()
    submit(engine, num_samples=4, max_tokens=2, ignore_eos=True)
    run(engine)
    assert [lengths for _, lengths, _ in engine.core.runner.backend.calls] == [[3], [1, 1, 1, 1]]


def test_newest_token_decides_about_eos_length_and_stop_strings(make_engine: MakeEngine) -> None:
    engine = make_engine()
    stops = submit(engine, "a", make_stop_check=lambda: lambda ids: len(ids) == 3, ignore_eos=True)
    length = submit(engine, "b", max_tokens=5, ignore_eos=True)
    run(engine)
    assert stops.reasons == [FinishReason.STOP] and len(stops.tokens[0]) == 3
    assert length.reasons == [FinishReason.LENGTH] and len(length.tokens[0]) == 5


def test_completion_may_fill_the_context_to_its_last_token(make_engine: MakeEngine) -> None:
    engine = make_engine(max_model_len=10)
    reader = submit(engine, max_tokens=7, ignore_eos=True, num_samples=2)
    run(engine)
    assert [len(ids) for ids in reader.completions] == [7, 7]


def test_scoring_and_generation_take_turns(make_engine: MakeEngine) -> None:
    observed = Observed()
    engine = make_engine(observer=observed)
    alone = submit(engine, seed=4, max_tokens=12, ignore_eos=True)
    run(engine)
    observed.phases.clear()
    reader = submit(engine, seed=4, max_tokens=12, ignore_eos=True)
    futures = [engine.score(ScoringRequest(f"s{i}", PROMPT, ((1, 2),))) for i in range(4)]
    run(engine)
    assert reader.completions == alone.completions
    assert observed.phases[:5] == ["prefill", "decode", "score", "decode", "score"]
    assert all(future.result(0) for future in futures)


def test_scoring_needs_no_row_of_a_running_sequence(make_engine: MakeEngine) -> None:
    observed = Observed()
    engine = make_engine(max_num_seqs=1, observer=observed)
    submit(engine, max_tokens=9, ignore_eos=True)
    engine.core.step()
    future = engine.score(ScoringRequest("s", PROMPT, ((1, 2),)))
    engine.core.step()
    assert observed.phases == ["prefill", "decode", "score"]
    assert future.done()


# Long prompts and prompts that come again

LONG = tuple(range(10, 35))


def test_long_prompt_in_chunks_gives_what_one_pass_gives(make_engine: MakeEngine) -> None:
    whole = make_engine()
    expected = submit(whole, prompt=LONG, num_samples=3, max_tokens=20)
    run(whole)
    engine = make_engine(max_pass_tokens=8)
    crowd = [submit(engine, f"o{i}", (i + 10,), seed=i, max_tokens=i + 2) for i in range(3)]
    reader = submit(engine, prompt=LONG, num_samples=3, max_tokens=20)
    run(engine)
    assert reader.completions == expected.completions
    calls = engine.core.runner.backend.calls
    assert all(max(lengths) <= 8 for _, lengths, _ in calls)
    assert all(sum(lengths) <= 8 for _, lengths, past in calls if any(past))
    assert all(len(other.endings) == 1 for other in crowd)


def test_running_sequences_decode_between_the_chunks_of_a_long_prompt(
    make_engine: MakeEngine,
) -> None:
    observed = Observed()
    engine = make_engine(max_pass_tokens=8, observer=observed)
    reader = submit(engine, "short", max_tokens=30, ignore_eos=True)
    engine.core.step()
    submit(engine, "long", LONG, max_tokens=2)
    for _ in range(4):
        engine.core.step()
    assert len(reader.tokens[0]) == 5
    assert observed.phases == ["prefill", *["decode", "prefill"] * 4]


def test_short_prompt_waits_for_one_chunk_of_a_long_one(make_engine: MakeEngine) -> None:
    engine = make_engine(max_pass_tokens=8)
    submit(engine, "long", LONG, max_tokens=2)
    engine.core.step()
    reader = submit(engine, "short", max_tokens=2)
    engine.core.step()
    engine.core.step()
    assert reader.tokens[0]


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_cancelled_long_prompt_ends_and_frees_its_row(
    make_engine: MakeEngine, num_steps: int
) -> None:
    engine = make_engine(max_pass_tokens=8)
    reader = submit(engine, prompt=LONG, num_samples=2)
    for _ in range(num_steps):
        engine.core.step()
    engine.cancel("r")
    engine.core.step()
    assert reader.reasons == [FinishReason.CANCELLED] * 2
    assert is_idle(engine)
    again = submit(engine, prompt=LONG)
    run(engine)
    assert len(again.completions) == 1


def test_prompt_that_comes_again_is_copied_and_gives_the_same(make_engine: MakeEngine) -> None:
    observed = Observed()
    engine = make_engine(observer=observed)
    first = submit(engine, seed=5, max_tokens=12)
    run(engine)
    engine.core.runner.backend.calls.clear()
    again = submit(engine, seed=5, max_tokens=12)
    run(engine)
    assert again.completions == first.completions
    assert all(lengths == [1] for _, lengths, _ in engine.core.runner.backend.calls)
    assert again.endings[0].num_cached_prompt_tokens == observed.cached_tokens == len(PROMPT)
    assert first.endings[0].num_cached_prompt_tokens == 0


def test_beginning_that_prompts_share_is_copied(make_engine: MakeEngine) -> None:
    engine = make_engine(max_model_len=400)
    shared = tuple(10 + i % 20 for i in range(2 * BLOCK_TOKENS))
    alone = submit(engine, prompt=(*shared, 7, 8, 9), cache_salt=None, max_tokens=12)
    submit(engine, "other", (*shared, 5, 5), max_tokens=1)
    run(engine)
    engine.core.runner.backend.calls.clear()
    reader = submit(engine, prompt=(*shared, 7, 8, 9), max_tokens=12)
    run(engine)
    assert engine.core.runner.backend.calls[0][1:] == ([3], [2 * BLOCK_TOKENS])
    assert reader.endings[0].num_cached_prompt_tokens == 2 * BLOCK_TOKENS
    assert reader.completions == alone.completions


@pytest.mark.parametrize(
    ("salts", "num_bytes"),
    [(("alice", "bob"), 1 << 20), (("", None), 1 << 20), ((None, ""), 1 << 20), (("", ""), 0)],
)
def test_prompt_is_run_again_for_another_tenant_and_for_those_who_opt_out(
    make_engine: MakeEngine, salts: tuple[str | None, str | None], num_bytes: int
) -> None:
    engine = make_engine(max_prefix_cache_bytes=num_bytes)
    for salt in salts:
        reader = submit(engine, cache_salt=salt, max_tokens=1)
        run(engine)
    assert len(engine.core.runner.backend.calls) == 2
    assert reader.endings[0].num_cached_prompt_tokens == 0


def test_prompt_with_nonfinite_logits_is_not_cached(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.core.runner.backend.nan_after = PROMPT[-1]
    assert submit(engine).endings == {}
    run(engine)
    engine.core.runner.backend.nan_after = None
    reader = submit(engine, max_tokens=1)
    run(engine)
    assert reader.reasons == [FinishReason.LENGTH]


# Endings


def test_cancelled_request_ends_before_the_next_pass_and_frees_its_rows(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    reader = submit(engine, num_samples=6, max_tokens=50, ignore_eos=True)
    other = submit(engine, "other", max_tokens=3, ignore_eos=True)
    engine.core.step()
    engine.cancel("r")
    run(engine, max_steps=4)
    assert reader.reasons == [FinishReason.CANCELLED] * 6
    assert [len(reader.tokens[index]) for index in range(6)] == [1, 1, 1, 0, 0, 0]
    assert other.reasons == [FinishReason.LENGTH]


def test_unknown_request_id_cancels_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    reader = submit(engine, max_tokens=2, ignore_eos=True)
    engine.cancel("nobody")
    run(engine)
    engine.cancel("r")
    engine.core.step()
    assert reader.reasons == [FinishReason.LENGTH]


def test_request_that_is_late_while_queued_never_reaches_the_model(
    make_engine: MakeEngine,
) -> None:
    clock = Clock()
    engine = make_engine(clock=clock)
    reader = submit(engine, deadline_s=101.0, num_samples=2)
    clock.now_s = 101.0
    engine.core.step()
    assert reader.reasons == [FinishReason.DEADLINE] * 2
    assert reader.endings[0].timings.queue_s == 1.0
    assert engine.core.runner.backend.calls == [] and is_idle(engine)


def test_request_that_expires_during_a_decode_step_is_not_let_in_by_the_same_step(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    engine = make_engine(clock=clock)
    submit(engine, "running", max_tokens=50, ignore_eos=True)
    engine.core.step()
    backend, late = engine.core.runner.backend, submit(engine, "late", deadline_s=101.0)
    forward = backend.forward

    def slow_forward(*args: Any) -> torch.Tensor:
        clock.now_s = 102.0
        return forward(*args)

    monkeypatch.setattr(backend, "forward", slow_forward)
    num_calls = len(backend.calls)
    engine.core.step()
    assert late.reasons == [FinishReason.DEADLINE]
    assert len(backend.calls) == num_calls + 1, "the decode step alone"


def test_request_that_is_late_while_running_keeps_its_tokens(make_engine: MakeEngine) -> None:
    clock = Clock()
    engine = make_engine(clock=clock)
    reader = submit(engine, deadline_s=101.0, max_tokens=50, ignore_eos=True)
    timeless = submit(engine, "t", max_tokens=9, ignore_eos=True)
    for _ in range(3):
        engine.core.step()
    clock.now_s = 102.0
    run(engine)
    assert reader.reasons == [FinishReason.DEADLINE]
    assert len(reader.tokens[0]) == 3
    assert timeless.reasons == [FinishReason.LENGTH]


def test_deadline_of_an_earlier_request_spares_a_later_one_of_the_same_id(
    make_engine: MakeEngine,
) -> None:
    clock = Clock()
    engine = make_engine(clock=clock)
    submit(engine, deadline_s=101.0, max_tokens=1)
    run(engine)
    reader = submit(engine, deadline_s=200.0, max_tokens=2, ignore_eos=True)
    clock.now_s = 150.0
    run(engine)
    assert reader.reasons == [FinishReason.LENGTH]


def test_nonfinite_logits_end_their_sequence_alone(make_engine: MakeEngine) -> None:
    observed = Observed()
    engine = make_engine(observer=observed)
    engine.core.runner.backend.nan_after = 30
    bad = submit(engine, "bad", (5, 30))
    good = submit(engine, "good", (5, 31), temperature=0.0, max_tokens=1)
    run(engine)
    assert bad.reasons == [FinishReason.ERROR] and bad.tokens[0] == []
    assert "non-finite" in bad.endings[0].error
    assert good.reasons == [FinishReason.LENGTH]
    assert observed.generation_tokens == 1


def test_failing_model_ends_all_in_flight_with_an_error_and_serves_on(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(max_num_seqs=2)
    readers = [submit(engine, str(i), max_tokens=50, ignore_eos=True) for i in range(3)]
    engine.core.step()
    future = engine.score(ScoringRequest("s", PROMPT, ((1,),)))
    engine.core.runner.backend.error = RuntimeError("out of memory")
    engine.step()
    assert [reader.reasons for reader in readers] == [[FinishReason.ERROR]] * 3
    assert "out of memory" not in readers[0].endings[0].error
    assert isinstance(future.exception(0), EngineFailedError) and is_idle(engine)
    engine.core.runner.backend.error = None
    after = submit(engine, max_tokens=2, ignore_eos=True)
    run(engine)
    assert after.reasons == [FinishReason.LENGTH]


def fail_steps(engine: Engine, count: int, **settings: Any) -> list[Reader]:
    backend = engine.core.runner.backend
    backend.error = RuntimeError("the device is lost")  # type: ignore[attr-defined]
    readers = []
    for number in range(count):
        if engine.core.inbox.is_closed:
            break
        readers.append(submit(engine, f"failing-{number}", **settings))
        engine.step()
    backend.error = None  # type: ignore[attr-defined]
    return readers


def test_engine_ends_when_steps_fail_in_a_row(make_engine: MakeEngine) -> None:
    engine = make_engine()
    readers = fail_steps(engine, MAX_FAILED_STEPS)
    assert [reader.reasons for reader in readers] == [[FinishReason.ERROR]] * MAX_FAILED_STEPS
    with pytest.raises(EngineStoppedError):
        submit(engine)


def test_engine_goes_on_when_a_pass_between_failures_succeeds(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for _ in range(3):
        fail_steps(engine, MAX_FAILED_STEPS - 1)
        after = submit(engine, max_tokens=2, ignore_eos=True)
        run(engine)
        assert after.reasons == [FinishReason.LENGTH]


def test_cached_prompt_between_failures_is_no_success(make_engine: MakeEngine) -> None:
    engine = make_engine()
    submit(engine, max_tokens=2, ignore_eos=True)
    run(engine)
    readers = fail_steps(engine, 2 * MAX_FAILED_STEPS, max_tokens=2, ignore_eos=True)
    assert {reader.reasons[0] for reader in readers} == {FinishReason.ERROR}
    with pytest.raises(EngineStoppedError):
        submit(engine)


def test_rows_that_fail_to_move_leave_nobody_without_an_end(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2)
    cancelled = submit(engine, "c", num_samples=4, max_tokens=50, ignore_eos=True)
    engine.core.step()

    def fail(moves: Any) -> None:
        raise RuntimeError("no memory to copy a row")

    engine.core.runner.move_rows = fail  # type: ignore[method-assign]
    engine.cancel("c")
    engine.step()
    assert cancelled.reasons == [FinishReason.CANCELLED] * 4
    assert is_idle(engine) and engine.load().num_unaccounted == 0


def test_stop_check_that_cannot_be_made_is_the_callers_error(make_engine: MakeEngine) -> None:
    engine = make_engine()

    def fail() -> Any:
        raise RuntimeError("a bug in a stop check")

    with pytest.raises(RuntimeError, match="stop check"):
        submit(engine, make_stop_check=fail)
    assert is_idle(engine) and engine.core.scheduler.is_empty


def test_step_that_fails_half_way_ends_nobody_twice(make_engine: MakeEngine) -> None:
    engine = make_engine()

    def fail(ids: list[int]) -> bool:
        raise RuntimeError("a bug in a stop check")

    done = submit(engine, "done", max_tokens=1)
    broken = submit(engine, "broken", make_stop_check=lambda: fail, ignore_eos=True)
    engine.step()
    assert done.reasons == [FinishReason.LENGTH]
    assert broken.reasons == [FinishReason.ERROR]
    assert is_idle(engine)


def test_reader_that_fails_disturbs_no_other(make_engine: MakeEngine) -> None:
    engine = make_engine()

    def gone(events: list[Event]) -> None:
        raise RuntimeError("the loop is closed")

    engine.submit(GenerationRequest("gone", PROMPT, SamplingParams(max_tokens=3)), gone)
    reader = submit(engine, max_tokens=3, ignore_eos=True)
    run(engine)
    assert reader.reasons == [FinishReason.LENGTH]


# The door


def test_full_queue_refuses_and_takes_again_when_there_is_room(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2, max_waiting=3)
    submit(engine, "a", num_samples=4)
    with pytest.raises(QueueFullError, match="holds 4 sequences and takes at most 3") as caught:
        submit(engine, "b", num_samples=2)
    assert caught.value.retry_after_s > 0
    assert engine.load().num_waiting == 4
    run(engine)
    submit(engine, "b", num_samples=2)
    run(engine)


def test_load_counts_running_and_waiting_and_returns_to_zero(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2)
    submit(engine, num_samples=5, max_tokens=3, ignore_eos=True)
    engine.score(ScoringRequest("s", PROMPT, ((1,),)))
    engine.core.step()
    load = engine.load()
    assert (load.num_running, load.num_waiting, load.max_num_seqs) == (0, 6, 2)
    engine.core.step()
    load = engine.load()
    assert (load.num_running, load.num_waiting, load.max_num_seqs) == (2, 4, 2)
    run(engine)
    assert engine.core.scheduler.is_empty


# What is reported


def test_prompt_is_counted_once_even_when_it_is_prefilled_again(make_engine: MakeEngine) -> None:
    observed = Observed()
    engine = make_engine(max_num_seqs=1, observer=observed)
    submit(engine, num_samples=3, max_tokens=2, ignore_eos=True)
    run(engine)
    assert observed.phases.count("prefill") == 3
    assert observed.prompt_tokens == len(PROMPT)


def test_tokens_endings_and_intervals_are_reported(make_engine: MakeEngine) -> None:
    observed = Observed()
    engine = make_engine(observer=observed)
    submit(engine, num_samples=3, max_tokens=4, ignore_eos=True)
    run(engine)
    assert (observed.generation_tokens, observed.intervals) == (12, 9)
    assert observed.reasons == [FinishReason.LENGTH] * 3


@pytest.mark.parametrize("in_one_pass", [True, False])
def test_scoring_counts_no_tokens_and_no_endings(
    make_engine: MakeEngine, in_one_pass: bool
) -> None:
    observed = Observed()
    engine = make_engine(observer=observed, scores_in_one_pass=in_one_pass)
    engine.score(ScoringRequest("s", PROMPT, ((1, 2), (3,))))
    run(engine)
    assert (observed.prompt_tokens, observed.generation_tokens, observed.reasons) == (0, 0, [])


def test_timings_run_from_arrival(make_engine: MakeEngine) -> None:
    clock = Clock()
    engine = make_engine(clock=clock)
    reader = submit(engine, max_tokens=2, ignore_eos=True)
    clock.now_s += 2
    engine.core.step()
    clock.now_s += 3
    engine.core.step()
    timings = reader.endings[0].timings
    assert (timings.queue_s, timings.ttft_s, timings.decode_s) == (2.0, 2.0, 3.0)


# The thread


def test_thread_serves_sleeps_and_serves_again(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.start()
    for seed in (1, 2):
        ended = threading.Event()
        reader = Reader()

        def sink(events: list[Event], reader: Reader = reader, ended: Any = ended) -> None:
            reader(events)
            if reader.endings:
                ended.set()

        engine.submit(GenerationRequest("r", PROMPT, SamplingParams(seed=seed)), sink)
        assert ended.wait(10)
    assert engine.load().is_alive
    engine.stop()
    assert not engine.load().is_alive


def test_stop_ends_everything_with_shutdown_and_refuses_more(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2, max_model_len=100_000)
    readers = [submit(engine, str(i), max_tokens=90_000, ignore_eos=True) for i in range(4)]
    engine.start()
    engine.stop()
    assert [reader.reasons for reader in readers] == [[FinishReason.SHUTDOWN]] * 4
    with pytest.raises(EngineStoppedError, match="engine is stopping"):
        submit(engine)
    assert is_idle(engine)


def test_engine_that_never_started_ends_what_it_took(make_engine: MakeEngine) -> None:
    engine = make_engine()
    reader = submit(engine)
    engine.stop()
    assert reader.reasons == [FinishReason.SHUTDOWN]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_dying_thread_ends_what_it_took_and_is_seen(make_engine: MakeEngine) -> None:
    engine = make_engine()
    reader = submit(engine)
    engine.core.runner.backend.error = SystemExit()
    engine.start()
    engine._thread.join(10)
    assert reader.reasons == [FinishReason.ERROR]
    assert not engine.load().is_alive
    with pytest.raises(EngineStoppedError):
        submit(engine)


class Hang:
    """A backend's `forward` that hangs from `begin` on, until `end`."""

    def __init__(self, engine: Engine) -> None:
        backend = engine.core.runner.backend
        self._forward = backend.forward
        self._may_run = threading.Event()
        self.is_hung = threading.Event()
        self.is_asked = False
        backend.forward = self  # type: ignore[method-assign]

    def begin(self) -> None:
        self.is_asked = True

    def end(self) -> None:
        self._may_run.set()

    def __call__(self, *arguments: Any) -> torch.Tensor:
        if self.is_asked:
            self.is_hung.set()
            assert self._may_run.wait(30), "a test forgot to end the hang"
        return self._forward(*arguments)


def watch_until_it_ends(engine: Engine) -> None:
    until_s = time.monotonic() + 60
    while not engine.core.inbox.is_closed:
        assert time.monotonic() < until_s
        engine.watch()
        time.sleep(0.01)


@pytest.mark.parametrize("max_pass_tokens", [None, 8])
def test_engine_that_hangs_in_the_model_ends_what_it_took_once(
    make_engine: MakeEngine, max_pass_tokens: int | None
) -> None:
    engine = make_engine(max_num_seqs=2, max_step_s=0.05, max_pass_tokens=max_pass_tokens)
    hang = Hang(engine)
    hang.begin()
    readers = [submit(engine, str(i), LONG, num_samples=2) for i in range(3)]
    future = engine.score(ScoringRequest("s", PROMPT, ((1,),)))
    engine.start()
    assert hang.is_hung.wait(10)
    watch_until_it_ends(engine)
    assert [reader.reasons for reader in readers] == [[FinishReason.ERROR] * 2] * 3
    assert "hangs" in readers[0].endings[0].error
    assert isinstance(future.exception(0), EngineFailedError)
    assert is_idle(engine) and not engine.load().is_alive
    with pytest.raises(EngineStoppedError):
        submit(engine)
    hang.end()
    engine._thread.join(10)
    assert not engine._thread.is_alive()
    assert [reader.reasons for reader in readers] == [[FinishReason.ERROR] * 2] * 3
    assert is_idle(engine) and engine.load().num_unaccounted == 0


def test_engine_that_hangs_beside_the_model_is_not_alive_and_ends_all_itself(
    make_engine: MakeEngine,
) -> None:
    engine, may_go_on = make_engine(max_step_s=0.05), threading.Event()
    reader = submit(engine, make_stop_check=lambda: lambda ids: may_go_on.wait(30) and False,
                    ignore_eos=True)  # fmt: skip
    engine.start()
    watch_until_it_ends(engine)
    assert not engine.load().is_alive and reader.endings == {}
    may_go_on.set()
    engine._thread.join(10)
    assert reader.reasons == [FinishReason.SHUTDOWN]


def test_waiting_for_the_turn_is_no_hang_but_holding_it_is(make_engine: MakeEngine) -> None:
    arbiter = StepArbiter()
    waits = make_engine(max_step_s=0.05, arbiter=arbiter, priority=0)
    hangs = make_engine(max_step_s=0.05, arbiter=arbiter, priority=1)
    hang = Hang(hangs)
    hang.begin()
    lost = submit(hangs)
    hangs.start()
    assert hang.is_hung.wait(10)
    ended = threading.Event()
    waits.submit(
        GenerationRequest("r", PROMPT, SamplingParams(max_tokens=1)), lambda events: ended.set()
    )
    waits.start()
    for _ in range(20):
        waits.watch()
        time.sleep(0.01)
    assert waits.load().is_alive and not ended.is_set()
    watch_until_it_ends(hangs)
    assert ended.wait(10)
    assert lost.reasons == [FinishReason.ERROR]
    waits.stop()
    hang.end()
    hangs.stop()


def test_stop_waits_no_longer_for_a_hung_step_than_it_may_take(make_engine: MakeEngine) -> None:
    engine = make_engine(max_step_s=0.05)
    hang = Hang(engine)
    hang.begin()
    reader = submit(engine)
    engine.start()
    assert hang.is_hung.wait(10)
    engine.stop()
    assert reader.reasons == [FinishReason.SHUTDOWN]
    hang.end()
    engine.stop()
    assert reader.reasons == [FinishReason.SHUTDOWN]


def test_random_traffic_ends_every_sequence_exactly_once(make_engine: MakeEngine) -> None:
    clock = Clock()
    engine = make_engine(
        max_num_seqs=3,
        clock=clock,
        max_waiting=1000,
        max_pass_tokens=4,
        max_prefix_cache_bytes=4000,
    )
    generator = torch.Generator().manual_seed(0)
    readers: dict[str, tuple[Reader, int]] = {}

    def below(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    for number in range(80):
        num_samples, request_id = 1 + below(5), str(number)
        deadline_s = clock.now_s + below(30) if below(3) == 0 else None
        prompt = tuple(10 + below(3) for _ in range(1 + below(9)))
        settings = {"num_samples": num_samples, "max_tokens": 1 + below(12), "seed": number}
        reader = submit(engine, request_id, prompt, deadline_s=deadline_s, **settings)
        readers[request_id] = reader, num_samples
        if below(4) == 0:
            engine.cancel(str(below(number + 1)))
        for _ in range(below(4)):
            engine.core.step()
            clock.now_s += 1
    run(engine, max_steps=5000)
    assert all(len(reader.endings) == count for reader, count in readers.values())
    assert engine.core.scheduler.is_empty
