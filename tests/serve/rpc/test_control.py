"""The control plane, through a real channel of its own listener."""

from __future__ import annotations

from collections import Counter
from typing import Any

import grpc

from protos.tandem.v1 import control_pb2, control_pb2_grpc
from protos.tandem.v1 import inference_pb2 as pb
from serve.pair.served import Role
from tests.support.rpc.calls import failure

CODE = grpc.StatusCode


def first_role(live: Any, request_id: str = "") -> int:
    request = pb.GenerateRequest(
        prompt="x",
        request_id=request_id,
        sampling=pb.SamplingParams(max_tokens=1),
        divergence=pb.DivergenceOptions(enabled=False),
    )
    return int(live.client.generate(request).result().samples[0].role)


def test_status_of_an_idle_server(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(max_num_seqs=8)) as live:
        status = live.control.status()
    assert status.state == control_pb2.SERVER_STATE_SERVING
    assert status.version and status.uptime_s > 0
    assert [engine.role for engine in status.engines] == [pb.ROLE_STUDENT, pb.ROLE_TEACHER]
    assert all(engine.is_alive and engine.max_num_seqs == 8 for engine in status.engines)
    assert (status.num_requests, status.num_shadows, status.ledger_imbalance) == (0, 0, 0)
    assert status.policy == control_pb2.Policy(student_weight=1, revision=1)


def test_policy_moves_auto_traffic_at_once(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(), student_weight=1, teacher_weight=0) as live:
        assert first_role(live) == pb.ROLE_STUDENT
        policy = live.control.set_policy(student_weight=0, teacher_weight=2)
        assert policy == control_pb2.Policy(teacher_weight=2, revision=2)
        assert live.control.policy() == policy
        assert first_role(live) == pb.ROLE_TEACHER


def test_weights_split_the_traffic_by_request_id(serving: Any, make_pair: Any) -> None:
    with serving(make_pair()) as live:
        live.control.set_policy(student_weight=3, teacher_weight=1)
        ids = [f"request {number}" for number in range(40)]
        roles = {request_id: first_role(live, request_id) for request_id in ids}
        again = {request_id: first_role(live, request_id) for request_id in ids}
    assert roles == again
    assert 22 <= Counter(roles.values())[pb.ROLE_STUDENT] <= 38


def test_stale_change_is_refused(serving: Any, make_pair: Any) -> None:
    with serving(make_pair()) as live:
        live.control.set_policy(shadow_rate=0.5, expected_revision=1)
        error = failure(lambda: live.control.set_policy(shadow_rate=1, expected_revision=1))
        assert error.code() is CODE.FAILED_PRECONDITION
        assert "revision 2" in error.details()
        assert live.control.policy().shadow_rate == 0.5


def test_policy_for_a_model_that_is_not_loaded_is_refused(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(roles=(Role.STUDENT,))) as live:
        error = failure(lambda: live.control.set_policy(teacher_weight=1))
        assert error.code() is CODE.NOT_FOUND
        error = failure(lambda: live.control.set_policy(shadow_rate=0.1))
        assert error.code() is CODE.FAILED_PRECONDITION


def test_abort_ends_a_request_and_frees_its_slots(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(max_model_len=100_000)) as live:
        sampling = pb.SamplingParams(num_samples=3, max_tokens=90_000, ignore_eos=True)
        stream = live.client.generate(
            pb.GenerateRequest(prompt="x", request_id="long one", sampling=sampling)
        )
        next(stream)
        live.control.abort("long one")
        error = failure(stream.result)
        assert error.code() is CODE.CANCELLED
        assert "operator" in error.details()
        assert first_role(live) == pb.ROLE_STUDENT
        status = live.control.status()
        assert (status.num_requests, status.ledger_imbalance) == (0, 0)
        assert [engine.num_running for engine in status.engines] == [0, 0]
        labels = {"role": "student", "finish_reason": "cancelled"}
        assert live.pair.value("samples_total", **labels) == 3


def test_abort_ends_a_scoring_that_waits(serving: Any, make_pair: Any) -> None:
    with serving(make_pair()) as live:
        live.pair.backends[Role.STUDENT].may_run.clear()
        completion = pb.Completion(token_ids=pb.TokenIds(ids=[5]))
        request = pb.ScoreRequest(prompt="x", request_id="s", completions=[completion])
        call = live.stub.Score.future(request)
        assert live.pair.backends[Role.STUDENT].is_asked.wait(10)
        live.control.abort("s")
        assert failure(call.result).code() is CODE.CANCELLED


def test_drain_tells_the_owner_of_the_server(serving: Any, make_pair: Any) -> None:
    drains: list[bool] = []
    with serving(make_pair(), on_drain=lambda: drains.append(True)) as live:
        live.control.drain()
        live.control.drain()
    assert drains == [True, True]


def test_states_follow_the_drain(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(max_model_len=4000), drain_delay_s=0.3) as live:
        sampling = pb.SamplingParams(max_tokens=800, ignore_eos=True)
        stream = live.client.generate(pb.GenerateRequest(prompt="x", sampling=sampling))
        next(stream)
        live.pair.backends[Role.STUDENT].may_run.clear()
        stopping = live.stop_soon()
        assert live.control.status().state == control_pb2.SERVER_STATE_LEAVING
        late = live.client.generate(pb.GenerateRequest(prompt="y", sampling=sampling))
        while live.control.status().state == control_pb2.SERVER_STATE_LEAVING:
            pass
        assert live.control.status().state == control_pb2.SERVER_STATE_DRAINING
        refused = live.client.generate(pb.GenerateRequest(prompt="z"))
        assert failure(refused.result).code() is CODE.UNAVAILABLE
        live.pair.backends[Role.STUDENT].may_run.set()
        assert len(stream.result().samples) == len(late.result().samples) == 1
        stopping.result(30)


def test_control_is_not_on_the_data_plane(live: Any) -> None:
    stub = control_pb2_grpc.ControlServiceStub(live.channel)
    error = failure(lambda: stub.GetStatus(control_pb2.GetStatusRequest(), timeout=10))
    assert error.code() is CODE.UNIMPLEMENTED
