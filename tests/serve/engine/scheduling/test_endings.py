"""Every sequence ends exactly once, whatever happens; and what is reported of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from serve.engine.core import MAX_FAILED_STEPS
from serve.engine.engine import Engine
from serve.engine.scoring import ScoringRequest
from serve.engine.sequence import (
    FinishReason,
)
from serve.errors import EngineFailedError, EngineStoppedError
from tests.support.engines import (
    PROMPT,
    CountingObserver,
    EventReader,
    StoppedClock,
    backend_of,
    is_idle,
    make_engine,
    run,
    submit,
)

# Endings


def test_request_that_is_late_while_queued_never_reaches_the_model() -> None:
    clock = StoppedClock()
    engine = make_engine(clock=clock)
    reader = submit(engine, deadline_s=101.0, num_samples=2)
    clock.now_s = 101.0
    engine.core.step()
    assert reader.reasons == [FinishReason.DEADLINE] * 2
    assert reader.endings[0].timings.queue_s == 1.0
    assert backend_of(engine).calls == [] and is_idle(engine)


def test_request_that_expires_during_a_decode_step_is_not_let_in_by_the_same_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = StoppedClock()
    engine = make_engine(clock=clock)
    submit(engine, "running", max_tokens=50, ignore_eos=True)
    engine.core.step()
    backend, late = backend_of(engine), submit(engine, "late", deadline_s=101.0)
    forward = backend.forward

    def slow_forward(*args: Any) -> torch.Tensor:
        clock.now_s = 102.0
        return forward(*args)

    monkeypatch.setattr(backend, "forward", slow_forward)
    num_calls = len(backend.calls)
    engine.core.step()
    assert late.reasons == [FinishReason.DEADLINE]
    assert len(backend.calls) == num_calls + 1, "the decode step alone"


def test_failing_model_ends_all_in_flight_with_an_error_and_serves_on() -> None:
    engine = make_engine(max_num_seqs=2)
    readers = [submit(engine, str(i), max_tokens=50, ignore_eos=True) for i in range(3)]
    engine.core.step()
    future = engine.score(ScoringRequest("s", PROMPT, ((1,),)))
    backend_of(engine).error = RuntimeError("out of memory")
    engine.step()
    assert [reader.reasons for reader in readers] == [[FinishReason.ERROR]] * 3
    assert "out of memory" not in readers[0].endings[0].error
    assert isinstance(future.exception(0), EngineFailedError) and is_idle(engine)
    backend_of(engine).error = None
    after = submit(engine, max_tokens=2, ignore_eos=True)
    run(engine)
    assert after.reasons == [FinishReason.LENGTH]


def fail_steps(engine: Engine, count: int, **settings: Any) -> list[EventReader]:
    backend = backend_of(engine)
    backend.error = RuntimeError("the device is lost")  # type: ignore[attr-defined]
    readers = []
    for number in range(count):
        if engine.core.inbox.is_closed:
            break
        readers.append(submit(engine, f"failing-{number}", **settings))
        engine.step()
    backend.error = None  # type: ignore[attr-defined]
    return readers


def test_engine_ends_when_steps_fail_in_a_row() -> None:
    engine = make_engine()
    readers = fail_steps(engine, MAX_FAILED_STEPS)
    assert [reader.reasons for reader in readers] == [[FinishReason.ERROR]] * MAX_FAILED_STEPS
    with pytest.raises(EngineStoppedError):
        submit(engine)


def test_engine_goes_on_when_a_pass_between_failures_succeeds() -> None:
    engine = make_engine()
    for _ in range(3):
        fail_steps(engine, MAX_FAILED_STEPS - 1)
        after = submit(engine, max_tokens=2, ignore_eos=True)
        run(engine)
        assert after.reasons == [FinishReason.LENGTH]


def test_cached_prompt_between_failures_is_no_success() -> None:
    engine = make_engine()
    submit(engine, max_tokens=2, ignore_eos=True)
    run(engine)
    readers = fail_steps(engine, 2 * MAX_FAILED_STEPS, max_tokens=2, ignore_eos=True)
    assert {reader.reasons[0] for reader in readers} == {FinishReason.ERROR}
    with pytest.raises(EngineStoppedError):
        submit(engine)


def test_rows_that_fail_to_move_leave_nobody_without_an_end() -> None:
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


def test_stop_check_that_cannot_be_made_is_the_callers_error() -> None:
    engine = make_engine()

    def fail() -> Any:
        raise RuntimeError("a bug in a stop check")

    with pytest.raises(RuntimeError, match="stop check"):
        submit(engine, make_stop_check=fail)
    assert is_idle(engine) and engine.core.scheduler.is_empty


def test_step_that_fails_half_way_ends_nobody_twice() -> None:
    engine = make_engine()

    def fail(ids: list[int]) -> bool:
        raise RuntimeError("a bug in a stop check")

    done = submit(engine, "done", max_tokens=1)
    broken = submit(engine, "broken", make_stop_check=lambda: fail, ignore_eos=True)
    engine.step()
    assert done.reasons == [FinishReason.LENGTH]
    assert broken.reasons == [FinishReason.ERROR]
    assert is_idle(engine)


# What is reported


def test_prompt_is_counted_once_even_when_it_is_prefilled_again() -> None:
    observed = CountingObserver()
    engine = make_engine(max_num_seqs=1, observer=observed)
    submit(engine, num_samples=3, max_tokens=2, ignore_eos=True)
    run(engine)
    assert observed.phases.count("prefill") == 3
    assert observed.prompt_tokens == len(PROMPT)


def test_tokens_endings_and_intervals_are_reported() -> None:
    observed = CountingObserver()
    engine = make_engine(observer=observed)
    submit(engine, num_samples=3, max_tokens=4, ignore_eos=True)
    run(engine)
    assert (observed.generation_tokens, observed.intervals) == (12, 9)
    assert observed.reasons == [FinishReason.LENGTH] * 3


@pytest.mark.parametrize("in_one_pass", [True, False])
def test_scoring_counts_no_tokens_and_no_endings(in_one_pass: bool) -> None:
    observed = CountingObserver()
    engine = make_engine(observer=observed, scores_in_one_pass=in_one_pass)
    engine.score(ScoringRequest("s", PROMPT, ((1, 2), (3,))))
    run(engine)
    assert (observed.prompt_tokens, observed.generation_tokens, observed.reasons) == (0, 0, [])


def test_timings_run_from_arrival() -> None:
    clock = StoppedClock()
    engine = make_engine(clock=clock)
    reader = submit(engine, max_tokens=2, ignore_eos=True)
    clock.now_s += 2
    engine.core.step()
    clock.now_s += 3
    engine.core.step()
    timings = reader.endings[0].timings
    assert (timings.queue_s, timings.ttft_s, timings.decode_s) == (2.0, 2.0, 3.0)


def test_random_traffic_ends_every_sequence_exactly_once() -> None:
    clock = StoppedClock()
    engine = make_engine(
        max_num_seqs=3,
        clock=clock,
        max_waiting=1000,
        max_pass_tokens=4,
        max_prefix_cache_bytes=4000,
    )
    generator = torch.Generator().manual_seed(0)
    readers: dict[str, tuple[EventReader, int]] = {}

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
