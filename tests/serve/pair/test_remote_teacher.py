"""A student's server whose teacher is another server: real servers, real channels."""

from __future__ import annotations

import asyncio
from concurrent.futures import CancelledError
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from protos.tandem.v1 import inference_pb2 as pb
from serve.client import explain
from serve.engine.scoring import ScoringRequest
from serve.engine.sequence import FinishReason, GenerationRequest
from serve.pair.served import Role
from serve.sampling.params import SamplingParams
from tests.support.polling import wait_until
from tests.support.rpc.remote_teachers import (
    COMPARE,
    NOWHERE,
    SAMPLING,
    SCORE,
    RemoteTeachers,
    check_student_alone,
    is_up,
    reached,
)


def timeless(response: Any) -> Any:
    """Return a response without what differs between two runs of the same request."""
    copy = type(response)()
    copy.CopyFrom(response)
    copy.usage.ClearField("seconds")
    for sample in getattr(copy, "samples", ()):
        sample.ClearField("timings")
    return copy


# The same answers as with a teacher in this process


def test_answers_are_those_of_a_teacher_here(
    remote: RemoteTeachers, serving: Any, make_pair: Any
) -> None:
    student = reached(remote.student(remote.teacher().server.address))
    with serving(make_pair()) as here:
        compared = [timeless(live.client.compare(COMPARE)) for live in (here, student)]
        scored = [timeless(live.client.score(SCORE)) for live in (here, student)]
    assert compared[0] == compared[1] and scored[0] == scored[1]
    assert all(sample.divergence.num_tokens for sample in compared[1].samples)


def test_stream_of_the_teacher_is_that_of_a_teacher_here(
    remote: RemoteTeachers, serving: Any, make_pair: Any
) -> None:
    request = pb.GenerateRequest(
        prompt="2 + 2 = ", request_id="g", route=pb.ROUTE_TEACHER, sampling=SAMPLING
    )
    student = reached(remote.student(remote.teacher().server.address))
    with serving(make_pair()) as here:
        streams = [list(live.client.generate(request)) for live in (here, student)]
    texts = [
        ["".join(e.tokens.text for e in events if e.tokens.index == i) for i in range(3)]
        for events in streams
    ]
    assert texts[0] == texts[1]
    assert sum(len(e.tokens.token_ids) for e in streams[1]) > 3
    usages = [events[-1].usage.roles[0] for events in streams]
    assert usages[0] == usages[1]


def test_models_say_what_is_remote(remote: RemoteTeachers) -> None:
    teacher = remote.teacher()
    student = reached(remote.student(teacher.server.address))
    first, second = student.client.get_models().models
    assert (first.role, first.address) == (pb.ROLE_STUDENT, "")
    assert (second.role, second.address) == (pb.ROLE_TEACHER, f"grpc://{teacher.server.address}")
    assert second.backend == "fake" and second.max_num_seqs == 8 and second.batch_invariant


def test_calls_of_the_teacher_are_counted(remote: RemoteTeachers) -> None:
    student = reached(remote.student(remote.teacher().server.address))
    student.client.compare(COMPARE)
    assert student.pair.value("remote_calls_total", rpc="Generate", code="OK") == 1
    assert student.pair.value("remote_calls_total", rpc="Score", code="OK") == 1


def test_series_of_a_remote_teacher_are_there_from_the_start(remote: RemoteTeachers) -> None:
    """What its calls may end with; of divergences all but those that need its logits."""
    registry = remote.student(NOWHERE).pair.metrics.registry
    labels = [(s.name, s.labels) for family in registry.collect() for s in family.samples]
    codes = {of["code"] for name, of in labels if name == "tandem_remote_calls_total"}
    assert codes == {code.name for code in grpc.StatusCode}
    assert {of["estimator"] for _, of in labels if "estimator" in of} == {"k1", "k2", "k3"}
    assert "tandem_compared_tokens_total" not in {name for name, _ in labels}


@pytest.mark.parametrize("rpc", ["compare", "score"])
def test_exact_divergence_is_refused(remote: RemoteTeachers, rpc: str) -> None:
    student = remote.student(NOWHERE)
    request = {"compare": pb.CompareRequest, "score": pb.ScoreRequest}[rpc]()
    request.CopyFrom({"compare": COMPARE, "score": SCORE}[rpc])
    request.divergence.exact = True
    with pytest.raises(grpc.RpcError) as caught:
        getattr(student.client, rpc)(request)
    assert "FAILED_PRECONDITION: the teacher is at grpc://127.0.0.1:1" in explain(caught.value)


# A lost teacher costs the teacher's part alone


def test_teacher_that_was_never_there_leaves_the_student(remote: RemoteTeachers) -> None:
    student = remote.student(NOWHERE)
    check_student_alone(student)
    assert student.server.is_healthy()
    health = health_pb2_grpc.HealthStub(student.channel)
    statuses = [
        health.Check(health_pb2.HealthCheckRequest(service=name)).status
        for name in ("", "readiness", "model.student", "model.teacher")
    ]
    assert statuses == [health_pb2.HealthCheckResponse.SERVING] * 3 + [
        health_pb2.HealthCheckResponse.NOT_SERVING
    ]
    assert [m.role for m in student.client.get_models().models] == [1, 2]


def test_route_to_a_lost_teacher_is_unavailable(remote: RemoteTeachers) -> None:
    student = remote.student(NOWHERE)
    with pytest.raises(grpc.RpcError) as caught:
        student.client.generate(pb.GenerateRequest(prompt="x", route=pb.ROUTE_TEACHER)).result()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "the teacher at grpc://127.0.0.1:1 is lost" in caught.value.details()


def test_policy_for_a_lost_teacher_means_the_student(remote: RemoteTeachers) -> None:
    student = remote.student(NOWHERE, student_weight=0, teacher_weight=1)
    (sample,) = student.client.generate(pb.GenerateRequest(prompt="x")).result().samples
    assert sample.role == pb.ROLE_STUDENT
    teacher = remote.teacher()
    student = reached(remote.student(teacher.server.address, student_weight=0, teacher_weight=1))
    (sample,) = student.client.generate(pb.GenerateRequest(prompt="x")).result().samples
    assert sample.role == pb.ROLE_TEACHER


def test_teacher_that_ends_is_lost_and_found_again(remote: RemoteTeachers) -> None:
    with remote.passing_teacher() as teacher:
        port = int(teacher.server.address.rpartition(":")[2])
        student = reached(remote.student(teacher.server.address))
    wait_until(lambda: not is_up(student), what="the loss")
    check_student_alone(student)
    remote.teacher(port=port)
    reached(student)
    assert all(s.HasField("divergence") for s in student.client.compare(COMPARE).samples)


def test_calls_on_their_way_end_with_the_teacher(remote: RemoteTeachers) -> None:
    with remote.passing_teacher(drain_grace_s=0) as teacher:
        student = reached(remote.student(teacher.server.address))
        teacher.pair.backends[Role.TEACHER].may_run.clear()
        sampling = pb.SamplingParams(num_samples=3, max_tokens=50, ignore_eos=True)
        answer = student.stub.Compare.future(pb.CompareRequest(prompt="x", sampling=sampling))
        assert teacher.pair.backends[Role.TEACHER].is_asked.wait(10)
        ended = teacher.stop_soon()
        wait_until(lambda: not teacher.pair.engines.teacher.is_alive, what="the stop of its engine")
        teacher.pair.backends[Role.TEACHER].may_run.set()
        samples = answer.result(20).samples
        ended.result(20)
    assert all(not sample.error for sample in samples[:3])
    assert {s.finish_reason for s in samples[3:]} <= {
        pb.FINISH_REASON_SHUTDOWN,
        pb.FINISH_REASON_ERROR,
    }


@pytest.mark.parametrize(
    ("is_streamed", "role"), [(False, pb.ROLE_STUDENT), (True, pb.ROLE_TEACHER)]
)
def test_student_answers_what_the_policy_gave_a_teacher_that_is_lost_meanwhile(
    remote: RemoteTeachers, is_streamed: bool, role: pb.Role
) -> None:
    """Unless the client has seen tokens of the teacher: then the answer ends with SHUTDOWN."""
    with remote.passing_teacher(drain_grace_s=0) as teacher:
        address = teacher.server.address
        student = reached(remote.student(address, student_weight=0, teacher_weight=1))
        request = pb.GenerateRequest(
            prompt="x",
            sampling=pb.SamplingParams(num_samples=4, max_tokens=200, ignore_eos=True),
            output=pb.OutputOptions(stream=is_streamed),
        )
        backend = teacher.pair.backends[Role.TEACHER]
        backend.hold_after = 20
        stream = student.client.generate(request)
        assert backend.is_held.wait(10)
        ended = teacher.stop_soon()
        wait_until(lambda: not teacher.pair.engines.teacher.is_alive, what="the stop of its engine")
        backend.may_run.set()
        samples = stream.result().samples
        ended.result(20)
    assert {sample.role for sample in samples} == {role}
    is_whole = [sample.finish_reason == pb.FINISH_REASON_LENGTH for sample in samples]
    assert is_whole == [not is_streamed] * 4


def test_teacher_that_hangs_does_not_cost_the_deadline(remote: RemoteTeachers) -> None:
    teacher = remote.teacher()
    student = reached(remote.student(teacher.server.address))
    teacher.pair.backends[Role.TEACHER].may_run.clear()
    request = pb.GenerateRequest(prompt="x", route=pb.ROUTE_STUDENT)
    (sample,) = student.client.generate(request, timeout_s=2).result().samples
    assert "deadline passed" in sample.divergence_error
    samples = student.client.compare(pb.CompareRequest(prompt="x"), timeout_s=2).samples
    assert [sample.finish_reason for sample in samples][1:] == [pb.FINISH_REASON_DEADLINE]


def test_cancelled_request_leaves_the_teacher_idle(remote: RemoteTeachers) -> None:
    teacher = remote.teacher()
    student = reached(remote.student(teacher.server.address))
    backend = teacher.pair.backends[Role.TEACHER]
    backend.may_run.clear()
    call = student.stub.Generate(pb.GenerateRequest(prompt="x", route=pb.ROUTE_TEACHER))
    assert backend.is_asked.wait(10)
    call.cancel()
    backend.may_run.set()
    engine = teacher.pair.engines.teacher.engine
    wait_until(lambda: engine.load().num_running + engine.load().num_waiting == 0, what="idleness")
    wait_until(
        lambda: student.pair.value("remote_calls_total", rpc="Generate", code="CANCELLED") == 1,
        what="the count",
    )


def test_call_that_is_cancelled_at_once_has_its_end(
    remote: RemoteTeachers, loop: asyncio.AbstractEventLoop
) -> None:
    student = reached(remote.student(remote.teacher().server.address))
    engine, events = student.pair.engines.teacher.engine, []

    async def begin_and_cancel() -> Any:
        engine.submit(GenerationRequest("r", (1,), SamplingParams(num_samples=2)), events.extend)
        scores = engine.score(ScoringRequest("r", (1,), ((2,),)))
        engine.cancel("r")
        return scores

    scores = asyncio.run_coroutine_threadsafe(begin_and_cancel(), loop).result(10)
    with pytest.raises(CancelledError):
        scores.result(10)
    wait_until(lambda: engine.load().num_running == 0, what="the end")
    assert [event.finish_reason for event in events] == [FinishReason.CANCELLED] * 2


def test_drain_of_the_student_ends_calls_of_the_teacher(remote: RemoteTeachers) -> None:
    teacher = remote.teacher()
    student = reached(remote.student(teacher.server.address, drain_grace_s=0))
    backend = teacher.pair.backends[Role.TEACHER]
    backend.may_run.clear()
    answer = student.stub.Compare.future(COMPARE)
    assert backend.is_asked.wait(10)
    student.stop_soon().result(20)
    assert answer.exception(20) is not None or all(s.error for s in answer.result().samples[3:])


def test_more_than_the_teacher_takes_is_no_error_of_the_student(
    remote: RemoteTeachers, serving: Any, make_pair: Any
) -> None:
    pair = make_pair(teacher=remote.logits, roles=(Role.TEACHER,), max_model_len=16)
    with serving(pair) as small:
        student = reached(remote.student(small.server.address))
        samples = student.client.compare(pb.CompareRequest(prompt="x" * 20)).samples
    assert not samples[0].error and "OUT_OF_RANGE" in samples[0].divergence_error
    assert "the context takes 16" in samples[1].error


def test_default_max_tokens_fits_the_shorter_context_of_the_teacher(
    remote: RemoteTeachers, serving: Any, make_pair: Any
) -> None:
    pair = make_pair(teacher=remote.logits, roles=(Role.TEACHER,), max_model_len=16)
    sampling = pb.SamplingParams(ignore_eos=True)
    with serving(pair) as small:
        student = reached(remote.student(small.server.address))
        request = pb.CompareRequest(prompt="x" * 10, sampling=sampling)
        samples = student.client.compare(request).samples
    assert [len(sample.token_ids) for sample in samples] == [6, 6]
    assert all(sample.HasField("divergence") for sample in samples)
