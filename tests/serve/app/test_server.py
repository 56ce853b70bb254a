"""Start, health, drain and end of a whole server."""

from __future__ import annotations

import socket
from collections.abc import Generator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bundle.errors import UserError
from protos.tandem.v1 import control_pb2
from protos.tandem.v1 import inference_pb2 as pb
from serve.app.config import ServeConfig
from serve.app.server import Server, initial_policy, limits_of
from serve.engine.turns import StepArbiter
from serve.pair.served import Role
from serve.rpc.inference import SERVICE_NAME
from tests.support.polling import wait_until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NAMES = ("", "readiness", SERVICE_NAME, "model.student", "model.teacher")


def health(live: Any, name: str) -> int:
    stub = health_pb2_grpc.HealthStub(live.channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status)


def test_every_health_name_is_serving(live: Any) -> None:
    assert {health(live, name) for name in (*NAMES, "liveness")} == {SERVING}


def test_drain_refuses_new_work_and_finishes_the_old(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(max_model_len=4000), drain_grace_s=30) as live:
        sampling = pb.SamplingParams(max_tokens=800, ignore_eos=True)
        stream = live.client.generate(pb.GenerateRequest(prompt="x", sampling=sampling))
        next(stream)
        live.pair.backends[Role.STUDENT].may_run.clear()
        stopping = live.stop_soon()
        wait_until(lambda: live.pair.value("draining") == 1)
        with pytest.raises(grpc.RpcError) as caught:
            live.client.compare(pb.CompareRequest(prompt="x"))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
        assert {health(live, name) for name in NAMES} == {NOT_SERVING}
        assert health(live, "liveness") == SERVING
        live.pair.backends[Role.STUDENT].may_run.set()
        sample = next(e.complete.sample for e in stream if e.HasField("complete"))
        stopping.result(30)
    assert (sample.finish_reason, len(sample.token_ids)) == (pb.FINISH_REASON_LENGTH, 800)


def test_what_outlasts_the_grace_ends_with_shutdown(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(max_model_len=100_000), drain_grace_s=0) as live:
        stream = live.client.generate(long_request())
        next(stream)
        stopping = live.stop_soon()
        events = list(stream)
        stopping.result(30)
    sample = next(e.complete.sample for e in events if e.HasField("complete"))
    assert sample.finish_reason == pb.FINISH_REASON_SHUTDOWN
    assert sample.token_ids
    # Whether the teacher still scored it depends on which engine stopped first.
    assert sample.HasField("divergence") != bool(sample.divergence_error)
    assert events[-1].HasField("usage")


@pytest.mark.parametrize("drain_delay_s", [60, 0])
def test_hurry_ends_the_delay_and_the_wait_for_running_work(
    serving: Any, make_pair: Any, drain_delay_s: int
) -> None:
    pair = make_pair(max_model_len=100_000)
    with serving(pair, drain_delay_s=drain_delay_s, drain_grace_s=60) as live:
        stream = live.client.generate(long_request())
        next(stream)
        stopping = live.stop_soon()
        wait_until(lambda: drain_delay_s or pair.value("draining") == 1)
        live.loop.call_soon_threadsafe(live.server.hurry)
        sample = next(e.complete.sample for e in stream if e.HasField("complete"))
        stopping.result(10)
    assert sample.finish_reason == pb.FINISH_REASON_SHUTDOWN


def test_model_that_hangs_with_the_turn_of_both_holds_up_the_end_once_and_not_for_long(
    serving: Any, make_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for `max_step_s`, 120 s, of each model: a pod has 60 s."""
    monkeypatch.setattr("serve.app.server.STOP_S", 0.3)
    pair = make_pair(max_model_len=100_000, arbiter=StepArbiter())
    teacher = pair.backends[Role.TEACHER]
    with serving(pair, drain_grace_s=0) as live:
        teacher.may_run.clear()
        streams = [
            live.client.generate(long_request(route=route))
            for route in (pb.ROUTE_TEACHER, pb.ROUTE_STUDENT)
        ]
        assert teacher.is_asked.wait(10)
        live.stop_soon().result(10)
        assert not teacher.may_run.is_set()
        with pytest.raises(grpc.RpcError) as caught:
            list(streams[0])
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not pair.engines.student.engine.load().num_running
    assert pair.value("ledger_imbalance") == 0


def test_stop_may_be_called_again(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(), drain_delay_s=0.1) as live:
        first, second = live.stop_soon(), live.stop_soon()
        second.result(10)
        assert first.done()
        live.stop_soon().result(60)


def test_handlers_that_wait_for_the_answer_process_do_not_hold_up_the_end(
    serving: Any, make_pair: Any
) -> None:
    formats = {"quick": "([0-9])", "hanging": r"((?:.+)+)\Zx"}
    settings = {"answer_formats": formats, "symbolic_timeout_s": 3600}
    with serving(make_pair(), drain_grace_s=0, **settings) as live:
        judged(live, "quick").result()  # the process has started by then
        hanging = judged(live, "hanging")
        labels = {"role": "student", "finish_reason": "length"}
        wait_until(lambda: live.pair.value("samples_total", **labels) == 2)
        assert live.control.status().num_requests == 1
        live.stop_soon().result(60)
        assert any(event.HasField("complete") for event in hanging)


def test_server_that_is_not_healthy_is_stopped_by_its_fixture(serving: Any, make_pair: Any) -> None:
    pair = make_pair()
    with serving(pair) as live:
        pair.engines.teacher.engine.stop()
        assert not live.server.is_healthy()
        address = live.server.address
    assert not pair.engines.student.engine.load().is_alive
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address.split(":"), timeout=5)


def judged(live: Any, answer_format: str) -> Any:
    return live.client.generate(
        pb.GenerateRequest(
            prompt="x",
            sampling=pb.SamplingParams(max_tokens=60, ignore_eos=True, seed=1),
            evaluation=pb.EvaluationOptions(answer_format=answer_format),
        )
    )


def long_request(**fields: Any) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=90_000, ignore_eos=True)
    return pb.GenerateRequest(prompt="x", sampling=sampling, **fields)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("is_hung", [False, True])
def test_lost_engine_takes_readiness_off_and_the_other_model_serves_on(
    serving: Any, make_pair: Any, is_hung: bool
) -> None:
    with serving(make_pair(max_step_s=0.2)) as live:
        watches = [watch(live, name) for name in ("model.teacher", "readiness")]
        assert [next(each) for each in watches] == [SERVING] * 2
        backend = live.pair.backends[Role.TEACHER]
        if is_hung:
            backend.may_run.clear()
        else:
            backend.error = SystemExit()
        with pytest.raises(grpc.RpcError, match="hangs" if is_hung else "engine"):
            live.client.score(pb.ScoreRequest(prompt="x", completions=[{"text": "y"}]))
        assert [next(each) for each in watches] == [NOT_SERVING] * 2
        assert {health(live, name) for name in ("", SERVICE_NAME)} == {NOT_SERVING}
        assert {health(live, name) for name in ("model.student", "liveness")} == {SERVING}
        divergence = pb.DivergenceOptions(enabled=False)
        request = pb.GenerateRequest(prompt="x", divergence=divergence)
        assert live.client.generate(request).result().samples
        for each in watches:
            each.close()
        live.stop_soon().result(60)


def watch(live: Any, name: str) -> Generator[int, None, None]:
    """Yield a health status, and then each change of it."""
    stub = health_pb2_grpc.HealthStub(live.channel)
    call = stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=20)
    try:
        for reply in call:
            yield reply.status
    finally:
        call.cancel()


def test_limits_are_the_lesser_models(make_pair: Any) -> None:
    engines = make_pair(max_model_len=77).engines
    limits = limits_of(engines, ServeConfig(bundle="x", tasks=frozenset({"a"})))
    assert (limits.max_model_len, limits.vocab_size, limits.tasks) == (77, 259, {"a"})


# The traffic policy at the start

BOTH, STUDENT, TEACHER = tuple(Role), (Role.STUDENT,), (Role.TEACHER,)


@pytest.mark.parametrize(
    ("roles", "settings", "weights"),
    [
        (BOTH, {}, (1, 0)),
        (STUDENT, {}, (1, 0)),
        (TEACHER, {}, (0, 1)),
        (STUDENT, {"student_weight": 3}, (3, 0)),
        (TEACHER, {"student_weight": 0, "teacher_weight": 2}, (0, 2)),
    ],
)
def test_policy_at_the_start_suits_what_is_loaded(
    make_pair: Any, roles: tuple[Role, ...], settings: dict[str, float], weights: tuple[float, ...]
) -> None:
    config = ServeConfig(bundle="x", **settings)
    policy = initial_policy(make_pair(roles=roles).engines, config)
    assert (policy.student_weight, policy.teacher_weight) == weights
    assert policy.revision == 1


@pytest.mark.parametrize(
    ("roles", "settings", "complaint"),
    [
        (STUDENT, {"student_weight": 0, "teacher_weight": 1}, "the teacher is not loaded here"),
        (STUDENT, {"teacher_weight": 1}, "the teacher is not loaded here"),
        (STUDENT, {"shadow_rate": 1}, "a shadow needs two models"),
        (TEACHER, {"student_weight": 2}, "the student is not loaded here"),
        (TEACHER, {"shadow_rate": 0.5}, "a shadow needs two models"),
    ],
)
def test_server_does_not_start_with_a_policy_that_it_cannot_serve(
    make_pair: Any, roles: tuple[Role, ...], settings: dict[str, float], complaint: str
) -> None:
    pair, config = make_pair(roles=roles), ServeConfig(bundle="x", **settings)
    with pytest.raises(UserError, match=rf"^--student-weight [^\n]*{complaint}[^\n]*$"):
        Server(pair.engines, config, pair.metrics)


def test_lone_teacher_answers_and_its_policy_can_be_changed(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(roles=TEACHER)) as live:
        assert live.control.policy() == control_pb2.Policy(teacher_weight=1, revision=1)
        assert live.control.set_policy(teacher_weight=2).revision == 2
        events = list(live.client.generate(pb.GenerateRequest(prompt="x")))
        sample = next(e.complete.sample for e in events if e.HasField("complete"))
        assert sample.role == pb.ROLE_TEACHER
