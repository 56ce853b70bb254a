"""Generate and GetModels through a real channel, over real engines and fake models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from protos.tandem.v1 import inference_pb2 as pb
from serve.client import violations
from serve.engine.sequence import FinishReason
from serve.pair.served import Role
from tests.support.polling import wait_until
from tests.support.rpc.calls import failure

CODE = grpc.StatusCode
MATH = pb.EvaluationOptions(answer_format="last_number")


def generate(live: Any, **fields: Any) -> list[pb.GenerateResponse]:
    return list(live.client.generate(pb.GenerateRequest(**fields)))


def completes(events: list[pb.GenerateResponse]) -> list[pb.Sample]:
    return [event.complete.sample for event in events if event.HasField("complete")]


def test_stream_has_tokens_then_completes_then_agreement_then_usage(live: Any) -> None:
    sampling = pb.SamplingParams(num_samples=3, max_tokens=9)
    events = generate(live, prompt="x", route=pb.ROUTE_STUDENT, sampling=sampling, evaluation=MATH)
    kinds = [event.WhichOneof("event") for event in events]
    num_tokens = kinds.count("tokens")
    assert num_tokens > 3
    assert kinds == ["tokens"] * num_tokens + ["complete"] * 3 + ["agreement", "usage"]


def test_chunks_add_up_to_the_samples(live: Any) -> None:
    sampling = pb.SamplingParams(num_samples=4, max_tokens=30, stop=["1 ", "42"])
    events = generate(live, prompt="x", route=pb.ROUTE_BOTH, sampling=sampling)
    chunks = [event.tokens for event in events if event.HasField("tokens")]
    samples = completes(events)
    assert len(samples) == 8
    for sample in samples:
        mine = [c for c in chunks if (c.role, c.index) == (sample.role, sample.index)]
        assert "".join(c.text for c in mine) == sample.text
        assert [t for c in mine for t in c.token_ids] == list(sample.token_ids)
        assert [x for c in mine for x in c.logprobs] == list(sample.logprobs)
        positions = [c.position for c in mine]
        assert positions == sorted(set(positions))


def test_stop_string_ends_and_is_cut(serving: Any, make_pair: Any, continuing_with: Any) -> None:
    with serving(make_pair(continuing_with("abc##"[:4]))) as live:
        sampling = pb.SamplingParams(stop=["c#"])
        (sample,) = completes(generate(live, prompt="?", sampling=sampling))
    assert (sample.text, len(sample.token_ids)) == ("ab", 4)
    assert sample.finish_reason == pb.FINISH_REASON_STOP
    assert list(sample.text_ends) == [1, 2, 2, 2]


def test_without_stream_only_the_final_events_come(live: Any) -> None:
    events = generate(live, prompt="x", output=pb.OutputOptions(stream=False))
    assert [event.WhichOneof("event") for event in events] == ["complete", "usage"]


def test_auto_lets_the_student_answer_and_the_teacher_score(live: Any) -> None:
    for route in (pb.ROUTE_UNSPECIFIED, pb.ROUTE_AUTO):
        (sample,) = completes(generate(live, prompt="x", route=route))
        assert sample.role == pb.ROLE_STUDENT
        assert sample.divergence.reference == pb.ROLE_TEACHER


def test_teacher_samples_are_scored_by_the_student(live: Any) -> None:
    sampling = pb.SamplingParams(num_samples=2, max_tokens=12)
    divergence = pb.DivergenceOptions(exact=True, per_token=True)
    samples = completes(
        generate(live, prompt="x", route=pb.ROUTE_TEACHER, sampling=sampling, divergence=divergence)
    )
    assert len(samples) == 2
    for sample in samples:
        found = sample.divergence
        assert sample.role == found.policy == pb.ROLE_TEACHER
        assert found.reference == pb.ROLE_STUDENT
        assert found.exact_mean >= 0 and 0 <= found.predicted_acceptance <= 1
        assert len(found.per_token_k3) == len(sample.token_ids)


def test_cancelled_stream_frees_its_slots(serving: Any, make_pair: Any) -> None:
    pair = make_pair(max_model_len=5000)
    engine = pair.engines.student.engine
    with serving(pair) as live:
        sampling = pb.SamplingParams(max_tokens=4000, ignore_eos=True)
        stream = live.client.generate(pb.GenerateRequest(prompt="x", sampling=sampling))
        next(stream)
        stream.close()
        cancelled = {"role": "student", "finish_reason": "cancelled"}
        wait_until(lambda: pair.value("samples_total", **cancelled) == 1)
        assert generate(live, prompt="x")[-1].HasField("usage")
    assert engine.load().num_running == engine.load().num_waiting == 0
    ended = {"rpc": "Generate", "route": "auto", "code": "CANCELLED", "task": "other"}
    assert pair.value("requests_total", **ended) == 1


def test_student_alone_answers_without_a_divergence(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(roles=(Role.STUDENT,))) as live:
        (sample,) = completes(generate(live, prompt="x"))
    assert sample.token_ids
    assert not sample.HasField("divergence") and not sample.divergence_error


# Requests that come again


def test_request_id_of_a_different_request_is_refused(serving: Any, make_pair: Any) -> None:
    pair = make_pair()
    with serving(pair) as live:
        pair.backends[Role.STUDENT].may_run.clear()
        request = pb.GenerateRequest(prompt="x", request_id="mine", route=pb.ROUTE_BOTH)
        first = live.client.generate(request)
        next(first)  # the teacher's: the request is admitted
        others: list[Callable[[], Any]] = [
            lambda: generate(live, prompt="x", request_id="mine"),
            lambda: live.client.compare(pb.CompareRequest(prompt="x", request_id="mine")),
        ]
        for other in others:
            error = failure(other)
            assert error.code() is CODE.INVALID_ARGUMENT
            assert list(violations(error)) == ["request_id"]
            assert "is running" in error.details()
        pair.backends[Role.STUDENT].may_run.set()
        assert list(first)[-1].usage.request_id == "mine"
        assert "was answered" in failure(others[0]).details()


def test_repeated_request_gets_the_same_responses_from_one_run(
    serving: Any, make_pair: Any
) -> None:
    with serving(make_pair()) as live:
        fields = {"prompt": "x", "request_id": "mine", "route": pb.ROUTE_BOTH}
        first, second = generate(live, **fields), generate(live, **fields)
        assert first == second
        assert live.pair.value("samples_total", role="student", finish_reason="stop") == 1
        labels = {"rpc": "Generate", "route": "both", "code": "OK", "task": "other"}
        assert live.pair.value("requests_total", **labels) == 2
        compare = pb.CompareRequest(prompt="x", request_id="other")
        assert live.client.compare(compare) == live.client.compare(compare)


def test_repeated_request_follows_the_one_that_runs(serving: Any, make_pair: Any) -> None:
    pair = make_pair()
    with serving(pair) as live:
        pair.backends[Role.TEACHER].may_run.clear()
        request = pb.GenerateRequest(prompt="x", request_id="mine", route=pb.ROUTE_BOTH)
        first = live.client.generate(request)
        begun = [next(first)]  # the student's
        second = live.client.generate(request)
        assert next(second) == begun[0]
        first.cancel()  # the second one keeps the run alive
        pair.backends[Role.TEACHER].may_run.set()
        assert list(second)[-1].usage.request_id == "mine"


def test_answer_without_its_divergence_is_computed_again(serving: Any, make_pair: Any) -> None:
    with serving(make_pair()) as live:
        request = pb.GenerateRequest(prompt="x", request_id="mine", route=pb.ROUTE_STUDENT)
        live.pair.backends[Role.TEACHER].error = RuntimeError("broken on purpose")
        (sample,) = live.client.generate(request).result().samples
        assert sample.divergence_error
        live.pair.backends[Role.TEACHER].error = None
        (again,) = live.client.generate(request).result().samples
    assert again.HasField("divergence") and again.token_ids == sample.token_ids


def test_full_queue_does_not_keep_a_request_from_its_own_run(serving: Any, make_pair: Any) -> None:
    pair = make_pair(max_num_seqs=1, max_waiting=0)
    student = pair.backends[Role.STUDENT]
    student.hold_after = 2
    sampling = pb.SamplingParams(max_tokens=4, ignore_eos=True)
    fields = {"request_id": "same", "prompt": "x", "sampling": sampling, "route": pb.ROUTE_STUDENT}
    with serving(pair) as live:
        first = live.client.generate(pb.GenerateRequest(**fields))
        assert student.is_held.wait(10)
        full = failure(lambda: generate(live, **{**fields, "request_id": "another"}))
        again = live.client.generate(pb.GenerateRequest(**fields))
        beginning = [next(again)]
        student.may_run.set()
        assert list(first) == [*beginning, *again]
        student.hold_after = 0
        assert generate(live, **{**fields, "request_id": "another"})
    assert full.code() is CODE.RESOURCE_EXHAUSTED


def test_models_are_described(live: Any) -> None:
    student, teacher = live.client.get_models().models
    assert (student.role, teacher.role) == (pb.ROLE_STUDENT, pb.ROLE_TEACHER)
    assert student.tokenizer_hash == teacher.tokenizer_hash
    assert (student.max_model_len, student.max_num_seqs, student.vocab_size) == (256, 8, 259)
    assert (student.backend, student.device, student.precision) == ("fake", "cpu", "float32")
    assert student.batch_invariant


def test_every_finish_reason_has_a_name_on_the_wire() -> None:
    names = {f"FINISH_REASON_{reason.name}" for reason in FinishReason}
    assert names | {"FINISH_REASON_UNSPECIFIED"} == set(pb.FinishReason.keys())
