"""How an arm ends, with an engine whose events the test chooses."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from protos.tandem.v1 import inference_pb2 as pb
from serve.engine.mail import Mailbox
from serve.engine.scoring import ScoredCompletion, ScoringRequest
from serve.engine.sequence import EventSink, FinishedEvent, FinishReason, Timings, TokenEvent
from serve.errors import DeadlineError, EngineFailedError, EngineStoppedError, QueueFullError
from serve.pair.arm import (
    ArmJob,
    SampleChunk,
    run_arm,
    run_second_arm,
)
from serve.pair.divergence import compare
from serve.pair.request import Limits
from serve.pair.served import Role, ServedModel
from serve.rpc.validation import validate_generate
from serve.text.tokenizer import Tokenizer


class ScriptedEngine:
    """Ends every sample for `reason` after `num_tokens` tokens; None never ends any."""

    def __init__(self, reason: FinishReason | None, num_tokens: int = 0) -> None:
        self.reason = reason
        self.num_tokens = num_tokens
        self.cancelled: list[str] = []
        self.error: Exception | None = None
        self.scored: Future[list[ScoredCompletion]] = Future()

    def submit(self, request: Any, sink: EventSink) -> None:
        if self.error is not None:
            raise self.error
        if self.reason is None:
            return
        ids, logprobs = (70,) * self.num_tokens, (-1.0,) * self.num_tokens
        for index in range(request.sampling.num_samples):
            sink([TokenEvent(index, i, 70, -1.0, -1.0) for i in range(self.num_tokens)])
            sink([FinishedEvent(index, self.reason, ids, logprobs, Timings(), "broken")])

    def score(self, request: ScoringRequest) -> Future[list[ScoredCompletion]]:
        return self.scored

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> None:
        self.cancelled.append(request_id)


MakeJob = Callable[..., ArmJob]


@pytest.fixture
def make_job(tokenizer: Tokenizer) -> MakeJob:
    def make(engine: ScriptedEngine, reference: ScriptedEngine | None = None) -> ArmJob:
        request = pb.GenerateRequest(
            prompt="x", request_id="id", sampling=pb.SamplingParams(num_samples=2)
        )
        student: Any = ServedModel(Role.STUDENT, engine, tokenizer)  # type: ignore[arg-type]
        teacher: Any = reference and ServedModel(Role.TEACHER, reference, tokenizer)  # type: ignore[arg-type]
        spec = validate_generate(request, Limits(max_model_len=200, vocab_size=259))
        return ArmJob("key", "", "", student, teacher, spec, (1, 2, 3), None, Mailbox())

    return make


def ignore(chunk: SampleChunk) -> None:
    """Nobody looks."""


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        (FinishReason.ERROR, EngineFailedError),
        (FinishReason.DEADLINE, DeadlineError),
        (FinishReason.SHUTDOWN, EngineStoppedError),
    ],
)
def test_arm_without_anything_to_return_raises(
    make_job: MakeJob, reason: FinishReason, error: type[Exception]
) -> None:
    with pytest.raises(error):
        asyncio.run(run_arm(make_job(ScriptedEngine(reason)), ignore))


def test_arm_that_was_shut_down_returns_the_tokens_it_has(make_job: MakeJob) -> None:
    job = make_job(ScriptedEngine(FinishReason.SHUTDOWN, num_tokens=2))
    result = asyncio.run(run_arm(job, ignore))
    assert [sample.token_ids for sample in result.samples] == [(70, 70)] * 2
    assert not result.is_complete


def test_reader_that_fails_ends_the_arm_and_sees_no_more(make_job: MakeJob) -> None:
    engine, seen = ScriptedEngine(FinishReason.STOP, num_tokens=1), []

    def fail(chunk: SampleChunk) -> None:
        seen.append(chunk.index)
        raise ValueError("broken reader")

    with pytest.raises(ValueError, match="broken reader"):
        asyncio.run(run_arm(make_job(engine), fail))
    assert seen == [0]
    assert engine.cancelled == ["key"]


def test_second_arm_that_is_refused_becomes_failed_samples(make_job: MakeJob) -> None:
    engine = ScriptedEngine(FinishReason.STOP)
    engine.error = QueueFullError("the queue is full", 1.0)
    result = asyncio.run(run_second_arm(make_job(engine), ignore))
    assert [(s.index, s.finish_reason, s.error) for s in result.samples] == [
        (0, FinishReason.ERROR, "the queue is full"),
        (1, FinishReason.ERROR, "the queue is full"),
    ]


@pytest.mark.parametrize("reason", [FinishReason.DEADLINE, FinishReason.SHUTDOWN])
def test_second_arm_that_ends_early_keeps_what_chunks_have_brought(
    make_job: MakeJob, reason: FinishReason
) -> None:
    chunks: list[SampleChunk] = []
    job = make_job(ScriptedEngine(reason, num_tokens=2))
    result = asyncio.run(run_second_arm(job, chunks.append))
    assert [sample.finish_reason for sample in result.samples] == [reason] * 2
    brought = [tuple(chunk.token_ids) for chunk in chunks]
    assert [sample.token_ids for sample in result.samples] == brought == [(70, 70)] * 2


def test_unexpected_failure_shows_an_id_instead_of_its_text(make_job: MakeJob) -> None:
    engine = ScriptedEngine(FinishReason.STOP)
    engine.error = KeyError("secret")
    result = asyncio.run(run_second_arm(make_job(engine), ignore))
    assert result.samples[0].error.startswith("internal error; error id ")


async def cancel_when_waiting(job: ArmJob) -> None:
    task = asyncio.create_task(run_arm(job, ignore))
    for _ in range(10):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_cancelled_arm_cancels_its_request(make_job: MakeJob) -> None:
    engine = ScriptedEngine(None)
    asyncio.run(cancel_when_waiting(make_job(engine)))
    assert engine.cancelled == ["key"]


def test_cancelled_scoring_is_taken_out_of_the_other_engine(make_job: MakeJob) -> None:
    reference = ScriptedEngine(None)
    job = make_job(ScriptedEngine(FinishReason.STOP, num_tokens=1), reference)
    asyncio.run(cancel_when_waiting(job))
    assert reference.cancelled == ["key"]
    assert not reference.scored.cancelled(), "that is for the engine to do, on its thread"


def test_end_of_a_cancelled_scoring_is_no_complaint(make_job: MakeJob) -> None:
    complaints: list[dict[str, Any]] = []
    engine = ScriptedEngine(None)

    async def cancel_then_fail() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: complaints.append(context))
        await cancel_when_waiting(make_job(ScriptedEngine(FinishReason.STOP, num_tokens=1), engine))
        engine.scored.set_exception(EngineStoppedError("too late"))
        await asyncio.sleep(0)
        engine.scored = Future()
        gc.collect()

    asyncio.run(cancel_then_fail())
    assert complaints == []


def test_deadline_of_the_reference_is_told(make_job: MakeJob) -> None:
    reference = ScriptedEngine(None)
    reference.scored.set_exception(TimeoutError("the deadline passed before the scoring pass"))
    job = make_job(ScriptedEngine(FinishReason.STOP, num_tokens=1), reference)
    result = asyncio.run(run_arm(job, ignore))
    assert {s.divergence_error for s in result.samples} == {
        "the deadline passed before the scoring pass"
    }


def test_sample_without_tokens_is_not_scored(make_job: MakeJob) -> None:
    job = make_job(ScriptedEngine(FinishReason.STOP), ScriptedEngine(None))
    result = asyncio.run(run_arm(job, ignore))
    assert [(s.divergence, s.divergence_error) for s in result.samples] == [(None, "")] * 2


def test_per_token_k3_is_nan_where_it_is_undefined() -> None:
    policy, reference = np.array([-1.0, -np.inf, -1.0]), np.array([-1.0, -np.inf, -np.inf])
    divergence = compare(Role.STUDENT, policy, Role.TEACHER, reference)
    assert divergence.per_token_k3[0] == 0
    assert np.isnan(divergence.per_token_k3[1]) and np.isinf(divergence.per_token_k3[2])
    assert divergence.summary.nonfinite_tokens == 2
