"""An engine's door, its thread, and how it ends when it hangs or dies."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from serve.engine.engine import Engine
from serve.engine.scoring import ScoringRequest
from serve.engine.sequence import (
    Event,
    FinishReason,
    GenerationRequest,
)
from serve.engine.turns import StepArbiter
from serve.errors import EngineFailedError, EngineStoppedError
from serve.sampling.params import SamplingParams
from tests.support.engines import (
    LONG_PROMPT,
    PROMPT,
    EventReader,
    backend_of,
    is_idle,
    make_engine,
    run,
    submit,
)
from tests.support.polling import wait_until


def test_load_counts_running_and_waiting_and_returns_to_zero() -> None:
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


# The thread


def test_thread_serves_sleeps_and_serves_again() -> None:
    engine = make_engine()
    engine.start()
    for seed in (1, 2):
        ended = threading.Event()
        reader = EventReader()

        def sink(events: list[Event], reader: EventReader = reader, ended: Any = ended) -> None:
            reader(events)
            if reader.endings:
                ended.set()

        engine.submit(GenerationRequest("r", PROMPT, SamplingParams(seed=seed)), sink)
        assert ended.wait(10)
    assert engine.load().is_alive
    engine.stop()
    assert not engine.load().is_alive


def test_stop_ends_everything_with_shutdown_and_refuses_more() -> None:
    engine = make_engine(max_num_seqs=2, max_model_len=100_000)
    readers = [submit(engine, str(i), max_tokens=90_000, ignore_eos=True) for i in range(4)]
    engine.start()
    engine.stop()
    assert [reader.reasons for reader in readers] == [[FinishReason.SHUTDOWN]] * 4
    with pytest.raises(EngineStoppedError, match="engine is stopping"):
        submit(engine)
    assert is_idle(engine)


def test_engine_that_never_started_ends_what_it_took() -> None:
    engine = make_engine()
    reader = submit(engine)
    engine.stop()
    assert reader.reasons == [FinishReason.SHUTDOWN]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_dying_thread_ends_what_it_took_and_is_seen() -> None:
    engine = make_engine()
    reader = submit(engine)
    backend_of(engine).error = SystemExit()
    engine.start()
    join(engine)
    assert reader.reasons == [FinishReason.ERROR]
    assert not engine.load().is_alive
    with pytest.raises(EngineStoppedError):
        submit(engine)


class Hang:
    """A backend's `forward` that hangs from `begin` on, until `end`."""

    def __init__(self, engine: Engine) -> None:
        backend = backend_of(engine)
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
    wait_until(lambda: engine.watch() or not engine.load().is_alive)


def join(engine: Engine) -> None:
    """Wait for the engine's thread."""
    for thread in threading.enumerate():
        if thread.name == engine.name:
            thread.join(10)
            assert not thread.is_alive()


@pytest.mark.parametrize("max_pass_tokens", [None, 8])
def test_engine_that_hangs_in_the_model_ends_what_it_took_once(max_pass_tokens: int | None) -> None:
    engine = make_engine(max_num_seqs=2, max_step_s=0.05, max_pass_tokens=max_pass_tokens)
    hang = Hang(engine)
    hang.begin()
    readers = [submit(engine, str(i), LONG_PROMPT, num_samples=2) for i in range(3)]
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
    join(engine)
    assert [reader.reasons for reader in readers] == [[FinishReason.ERROR] * 2] * 3
    assert is_idle(engine) and engine.load().num_unaccounted == 0


def test_engine_that_hangs_beside_the_model_is_not_alive_and_ends_all_itself() -> None:
    engine, may_go_on = make_engine(max_step_s=0.05), threading.Event()
    reader = submit(engine, make_stop_check=lambda: lambda ids: may_go_on.wait(30) and False,
                    ignore_eos=True)  # fmt: skip
    engine.start()
    watch_until_it_ends(engine)
    assert not engine.load().is_alive and reader.endings == {}
    may_go_on.set()
    join(engine)
    assert reader.reasons == [FinishReason.SHUTDOWN]


def test_waiting_for_the_turn_is_no_hang_but_holding_it_is() -> None:
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


def test_stop_waits_no_longer_for_a_hung_step_than_it_may_take() -> None:
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
