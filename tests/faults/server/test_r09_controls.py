"""Rows R9 to R12 object to builds that are broken on purpose."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from serve.engine import core as core_module
from serve.engine.core import EngineCore
from serve.engine.mail import Outbox
from serve.engine.rows import Rows
from serve.engine.runner import ModelRunner
from serve.engine.sequence import FinishReason, Sequence, TokenEvent
from serve.engine.watchdog import Watchdog
from serve.models.kv_cache import KVCache
from serve.sampling.sampler import Sampler
from tests.faults.bundles import r12_no_gpu
from tests.faults.result import RowResult, Size
from tests.faults.server import r09_nan, r10_engine, r11_out_of_memory


@pytest.fixture
def r09(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(r09_nan.NUM_REQUESTS, Size.CI, 40)
    return r09_nan


@pytest.fixture
def r10(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run R10 with one of its faults."""
    monkeypatch.setitem(r10_engine.NUM_REQUESTS, Size.CI, 40)
    monkeypatch.setattr(r10_engine, "NUM_TEMPLATES", 24)
    monkeypatch.setattr(r10_engine, "FIRST_PASS", 6)

    def run(name: str) -> RowResult:
        cases = [case for case in r10_engine.CASES if case.name == name]
        assert cases
        monkeypatch.setattr(r10_engine, "CASES", cases)
        return r10_engine.run(Size.CI)

    return run


@pytest.fixture
def r11(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(r11_out_of_memory.NUM_REQUESTS, Size.CI, 20)

    def run(name: str) -> RowResult:
        phases = [phase for phase in r11_out_of_memory.PHASES if phase.name == name]
        assert phases
        monkeypatch.setattr(r11_out_of_memory, "PHASES", phases)
        return r11_out_of_memory.run(Size.CI)

    return run


def found(result: RowResult) -> str:
    assert not result.is_passed
    return "\n".join([*result.leaks, *result.problems])


def test_r9_objects_to_nan_that_stays_in_the_cache(
    r09: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVCache, "scrub", lambda cache, row, start: None)
    result = r09.run(Size.CI)
    assert "answers differ beside NaN" in found(result) and result.num_altered > 0


def test_r9_objects_to_a_batch_that_fails_as_a_whole(
    r09: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Sampler.sample

    def infectious(sampler: Sampler, *arguments: Any) -> Any:
        batch = sample(sampler, *arguments)
        batch.is_finite[:] = [all(batch.is_finite)] * len(batch.is_finite)
        return batch

    monkeypatch.setattr(Sampler, "sample", infectious)
    assert "batch mates differ" in found(r09.run(Size.CI))


def test_r10_objects_to_a_hang_that_nobody_notices(
    r10: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Watchdog.look
    monkeypatch.setattr(Watchdog, "look", lambda watchdog: look(watchdog) and is_late())
    looks = iter(range(1000))

    def is_late() -> bool:
        return next(looks) > 8

    assert "s late" in found(r10("hangs"))


def test_r10_objects_to_an_engine_that_fails_for_ever(
    r10: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_module, "MAX_FAILED_STEPS", 10**9)
    assert "readiness stayed on" in found(r10("fails always"))


def test_r10_objects_to_a_dropped_event(r10: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Outbox.add

    def forgetful(outbox: Outbox, group: Any, event: Any) -> None:
        if not (isinstance(event, TokenEvent) and event.position == 3):
            add(outbox, group, event)

    monkeypatch.setattr(Outbox, "add", forgetful)
    result = r10("fails once")
    assert result.num_lost + result.num_altered > 0 and not result.is_passed


def test_r10_objects_to_a_slot_that_stays_taken(r10: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clear = Rows.clear

    def leaky(rows: Rows) -> Any:
        sequences = clear(rows)
        rows.running += sequences[:1]
        return sequences

    monkeypatch.setattr(r10_engine, "SETTLE_S", 0.1)
    monkeypatch.setattr(Rows, "clear", leaky)
    assert "teacher slots: 1" in found(r10("thread dies"))


def test_r10_objects_to_an_end_that_is_told_twice(
    r10: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the lock's flag the step that hung goes on with what was ended without it."""
    end_all = EngineCore.end_all

    def twice(core: EngineCore, reason: FinishReason, error: str) -> None:
        watchdog = core.runner.watchdog
        if watchdog.is_abandoned and reason is FinishReason.ERROR:
            watchdog.is_abandoned = False
        end_all(core, reason, error)
        core.stats.observer.on_finished(reason)

    monkeypatch.setattr(EngineCore, "end_all", twice)
    assert "ended twice" in found(r10("hangs"))


def test_r11_objects_where_nothing_is_tried_again(
    r11: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelRunner, "try_twice", lambda runner, run: run(runner.max_pass_tokens))
    assert "others were harmed" in found(r11("now and then"))


def test_r11_objects_to_a_retry_of_the_same_size(r11: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stubborn(runner: ModelRunner, run: Any) -> Any:
        try:
            return run(runner.max_pass_tokens)
        except RuntimeError:
            return run(runner.max_pass_tokens)

    monkeypatch.setattr(ModelRunner, "try_twice", stubborn)
    assert "others were harmed" in found(r11("large passes"))


def test_r11_objects_to_a_repeated_token(r11: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = Sequence.finished_event

    def repeats(sequence: Sequence, *arguments: Any) -> Any:
        sequence.token_ids += sequence.token_ids[-1:]
        sequence.logprobs += sequence.logprobs[-1:]
        return finished(sequence, *arguments)

    monkeypatch.setattr(Sequence, "finished_event", repeats)
    assert r11("now and then").num_altered > 0


def test_r11_objects_where_memory_ends_everything(
    r11: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.engine.runner.is_out_of_memory", lambda error: False)
    assert "others were harmed" in found(r11("some prompts"))


@pytest.mark.parametrize(
    ("code", "stderr", "text"),
    [
        (1, "--device cuda: no GPU; use cpu or auto", "exit code 1"),
        (0, "serving on the CPU", "exit code 0"),
        (2, "tandem: cannot load bundle: header too small", "exit code 2"),
        (3, "Traceback\n--device cuda: no GPU; use cpu or auto", "2 lines"),
        (3, "no GPU", "does not say what to do"),
    ],
)
def test_r12_objects_to_another_end(code: int, stderr: str, text: str) -> None:
    result = RowResult("R12", "")
    r12_no_gpu.judge(result, (), subprocess.CompletedProcess([], code, "", stderr))
    assert text in found(result)


def test_r12_objects_to_models_that_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(r12_no_gpu, "MODELS", ())
    monkeypatch.setattr(r12_no_gpu, "NUM_STARTS", {Size.CI: 0})
    assert "onnx: without --device cuda the start says None" in found(r12_no_gpu.run(Size.CI))


def test_r12_takes_the_right_end() -> None:
    result = RowResult("R12", "")
    line = "tandem: --device cuda: torch finds no CUDA device; use cpu or auto\n"
    r12_no_gpu.judge(result, (), subprocess.CompletedProcess([], 3, "", line))
    assert result.is_passed
