"""The data plane through a real channel, over real engines and fake models."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2, status_pb2

from protos.tandem.v1 import inference_pb2 as pb
from serve.client import violations
from serve.engine.engine import MAX_FAILED_STEPS
from serve.engine.sequence import FinishReason
from serve.pair.served import Role

CODE = grpc.StatusCode
MATH = pb.EvaluationOptions(answer_format="last_number")


def failure(call: Callable[[], Any]) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def generate(live: Any, **fields: Any) -> list[pb.GenerateResponse]:
    return list(live.client.generate(pb.GenerateRequest(**fields)))


def completes(events: list[pb.GenerateResponse]) -> list[pb.Sample]:
    return [event.complete.sample for event in events if event.HasField("complete")]


def retry_delay_s(error: Any) -> float:
    details = status_pb2.Status.FromString(
        dict(error.trailing_metadata())["grpc-status-details-bin"]
    ).details
    info = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(info) for detail in details)
    return float(info.retry_delay.ToTimedelta().total_seconds())


# Compare


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_k_sums_recompute_from_returned_logprobs(live: Any, temperature: float) -> None:
    sampling = pb.SamplingParams(num_samples=8, temperature=temperature, max_tokens=20)
    response = live.client.compare(pb.CompareRequest(prompt="1+1=", sampling=sampling))
    assert len(response.samples) == 16
    for sample in response.samples:
        d = sample.divergence
        x = np.array(d.reference_logprobs) - np.array(sample.logprobs)
        assert len(x) == len(sample.token_ids) == d.num_tokens
        expected = (-x.sum(), (x**2).sum() / 2, (np.expm1(x) - x).sum())
        np.testing.assert_allclose((d.k1_sum, d.k2_sum, d.k3_sum), expected, atol=1e-5)
        assert d.k3_mean == pytest.approx(d.k3_sum / d.num_tokens)
        assert d.policy == sample.role and d.reference == 3 - sample.role


def test_samples_are_the_students_by_index_then_the_teachers(live: Any) -> None:
    sampling = pb.SamplingParams(num_samples=3, max_tokens=4)
    response = live.client.compare(pb.CompareRequest(prompt="x", sampling=sampling))
    order = [(sample.role, sample.index) for sample in response.samples]
    assert order == [(role, i) for role in (pb.ROLE_STUDENT, pb.ROLE_TEACHER) for i in range(3)]


def test_returned_seed_repeats_the_run(live: Any) -> None:
    sampling = pb.SamplingParams(num_samples=4, max_tokens=16)
    first = live.client.compare(pb.CompareRequest(prompt="x", sampling=sampling))
    sampling.seed = first.usage.seed
    again = live.client.compare(pb.CompareRequest(prompt="x", sampling=sampling))
    assert [list(s.token_ids) for s in again.samples] == [list(s.token_ids) for s in first.samples]


def test_both_arms_draw_with_the_same_seed(serving: Any, make_pair: Any) -> None:
    logits = make_pair().backends[Role.STUDENT].logits
    with serving(make_pair(logits, logits)) as live:
        sampling = pb.SamplingParams(num_samples=4, max_tokens=16)
        response = live.client.compare(pb.CompareRequest(prompt="x", sampling=sampling))
    student, teacher = response.samples[:4], response.samples[4:]
    assert [list(s.token_ids) for s in student] == [list(s.token_ids) for s in teacher]
    assert all(s.divergence.k3_sum == pytest.approx(0, abs=1e-9) for s in response.samples)


def test_exact_divergence_is_the_full_vocabulary_kl(live: Any) -> None:
    request = pb.CompareRequest(
        prompt="x",
        sampling=pb.SamplingParams(temperature=0.5, max_tokens=40, seed=1, ignore_eos=True),
        divergence=pb.DivergenceOptions(exact=True),
    )
    sample = live.client.compare(request).samples[0]
    conditions = [*live.pair.engines.student.tokenizer.encode("x"), *sample.token_ids[:-1]]
    p, q = (
        torch.log_softmax(live.pair.backends[role].logits[conditions].double() / 0.5, -1)
        for role in (Role.STUDENT, Role.TEACHER)
    )
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert sample.divergence.exact_mean == pytest.approx(float(kl), rel=1e-5)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert sample.divergence.argmax_agreement == pytest.approx(float(same))
    acceptance = torch.minimum(p, q).exp().sum(-1).mean()
    assert sample.divergence.predicted_acceptance == pytest.approx(float(acceptance), rel=1e-5)


def test_truncated_sampling_is_marked(live: Any) -> None:
    for top_k, is_truncated in ((5, True), (0, False)):
        sampling = pb.SamplingParams(top_k=top_k, max_tokens=4)
        response = live.client.compare(pb.CompareRequest(prompt="x", sampling=sampling))
        assert [s.divergence.truncated for s in response.samples] == [is_truncated] * 2


def test_greedy_requests_are_reported_raw(live: Any) -> None:
    sampling = pb.SamplingParams(temperature=0, max_tokens=4)
    response = live.client.compare(pb.CompareRequest(prompt="x", sampling=sampling))
    assert {s.divergence.basis for s in response.samples} == {pb.BASIS_RAW}


def test_per_token_k3_adds_up(live: Any) -> None:
    request = pb.CompareRequest(prompt="x", divergence=pb.DivergenceOptions(per_token=True))
    for sample in live.client.compare(request).samples:
        divergence = sample.divergence
        assert sum(divergence.per_token_k3) == pytest.approx(divergence.k3_sum)


def test_divergence_is_absent_when_switched_off(live: Any) -> None:
    request = pb.CompareRequest(prompt="x", divergence=pb.DivergenceOptions(enabled=False))
    samples = live.client.compare(request).samples
    assert not any(s.HasField("divergence") or s.divergence_error for s in samples)


def test_output_options_leave_parts_out(live: Any) -> None:
    output = pb.OutputOptions(logprobs=False, text=False, top_logprobs=3)
    sample = live.client.compare(pb.CompareRequest(prompt="x", output=output)).samples[0]
    assert (sample.text, list(sample.text_ends), list(sample.logprobs)) == ("", [], [])
    assert list(sample.divergence.reference_logprobs) == []
    assert {len(top.entries) for top in sample.top_logprobs} == {3}


def test_processed_logprobs_are_of_what_was_drawn_from(live: Any) -> None:
    def sample_with(**settings: Any) -> pb.Sample:
        request = pb.CompareRequest(
            prompt="x",
            sampling=pb.SamplingParams(max_tokens=6, seed=3, **settings),
            output=pb.OutputOptions(processed_logprobs=True),
        )
        return live.client.compare(request).samples[0]

    plain, truncated, greedy = (
        sample_with(**settings) for settings in ({}, {"top_k": 2}, {"temperature": 0})
    )
    assert list(plain.processed_logprobs) == list(plain.logprobs) != []
    pairs = zip(truncated.processed_logprobs, truncated.logprobs, strict=True)
    assert all(processed > raw for processed, raw in pairs)
    assert list(greedy.processed_logprobs) == [0.0] * len(greedy.token_ids)
    assert not live.client.compare(pb.CompareRequest(prompt="x")).samples[0].processed_logprobs


def test_usage_counts_tokens_of_both_models(live: Any) -> None:
    sampling = pb.SamplingParams(num_samples=2, max_tokens=8)
    response = live.client.compare(pb.CompareRequest(prompt="four", sampling=sampling))
    for usage in response.usage.roles:
        samples = [s for s in response.samples if s.role == usage.role]
        assert usage.prompt_tokens == 4
        assert usage.completion_tokens == sum(len(s.token_ids) for s in samples)


def chat(*turns: tuple[str, str]) -> pb.ChatMessages:
    return pb.ChatMessages(messages=[pb.ChatMessage(role=r, content=c) for r, c in turns])


def test_prompt_comes_back_as_each_model_saw_it(live: Any) -> None:
    """Of every rpc; sent as ids they are the same prompt."""
    sampling = pb.SamplingParams(max_tokens=4, seed=3)
    output = pb.OutputOptions(return_prompt_token_ids=True)
    fields = {"sampling": sampling, "output": output}
    question = {"messages": chat(("user", "Hi"))}
    compared = live.client.compare(pb.CompareRequest(**question, **fields))
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    expected = list(live.pair.engines.student.tokenizer.encode(text))
    assert [list(role.prompt_token_ids) for role in compared.usage.roles] == [expected] * 2
    ids = pb.TokenIds(ids=expected)
    again = live.client.compare(pb.CompareRequest(prompt_token_ids=ids, **fields))
    assert [s.token_ids for s in again.samples] == [s.token_ids for s in compared.samples]
    generated = live.client.generate(pb.GenerateRequest(**question, **fields)).result()
    scored = live.client.score(
        pb.ScoreRequest(
            **question, completions=[pb.Completion(text="a")], return_prompt_token_ids=True
        )
    )
    for usage in (generated.usage, scored.usage):
        assert list(usage.roles[0].prompt_token_ids) == expected


def test_prompt_comes_back_to_those_who_ask(live: Any) -> None:
    compared = live.client.compare(pb.CompareRequest(prompt="x"))
    scored = live.client.score(pb.ScoreRequest(prompt="x", completions=[pb.Completion(text="a")]))
    roles = [*compared.usage.roles, *scored.usage.roles]
    assert len(roles) == 4 and not any(role.prompt_token_ids for role in roles)


TURN = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("content", ["The answer is", "", "<|im_end|> is a name "])
def test_final_message_is_continued(live: Any, content: str) -> None:
    """In the place of an opened turn; a special token's name in it stays text."""
    messages = chat(("user", "Hi"), ("assistant", content))
    messages.continue_final_message = True
    output = pb.OutputOptions(return_prompt_token_ids=True)
    fields = {"messages": messages, "output": output, "sampling": pb.SamplingParams(max_tokens=2)}
    answer = live.client.compare(pb.CompareRequest(**fields))
    generated = live.client.generate(pb.GenerateRequest(**fields)).result()
    completions = [pb.Completion(text="a")]
    scored = live.client.score(
        pb.ScoreRequest(messages=messages, completions=completions, return_prompt_token_ids=True)
    )
    encode = live.pair.engines.student.tokenizer.encode
    expected = [*encode(TURN), *(token_id for char in content for token_id in encode(char))]
    for usage in (answer.usage, generated.usage, scored.usage):
        assert list(usage.roles[0].prompt_token_ids) == expected


def test_default_max_tokens_ends_with_the_context(live: Any) -> None:
    """A given one that exceeds it is refused: see the table of statuses."""
    sampling = pb.SamplingParams(num_samples=2, ignore_eos=True)
    samples = live.client.compare(pb.CompareRequest(prompt="x" * 250, sampling=sampling)).samples
    assert [len(sample.token_ids) for sample in samples] == [6] * 4
    assert {sample.finish_reason for sample in samples} == {pb.FINISH_REASON_LENGTH}


def test_gold_answer_judges_both_models(serving: Any, make_pair: Any, continuing_with: Any) -> None:
    pair = make_pair(continuing_with("3"), continuing_with("4"))
    evaluation = pb.EvaluationOptions(
        answer_format="last_number", reference_answer="4.0", pass_at_k=[1, 2]
    )
    request = pb.CompareRequest(
        prompt="2+2?", sampling=pb.SamplingParams(num_samples=2), evaluation=evaluation
    )
    with serving(pair) as live:
        response = live.client.compare(request)
    assert [(s.answer, s.correct) for s in response.samples] == [("3", False)] * 2 + [
        ("4", True)
    ] * 2
    agreement = response.agreement
    assert (agreement.student.answer, agreement.teacher.answer) == ("3", "4")
    assert agreement.HasField("same_answer") and not agreement.same_answer
    assert dict(agreement.student_pass_at_k) == {1: 0.0, 2: 0.0}
    assert dict(agreement.teacher_pass_at_k) == {1: 1.0, 2: 1.0}
    assert agreement.reference_kind == pb.REFERENCE_KIND_GOLD


def test_teacher_consensus_stands_in_for_gold(
    serving: Any, make_pair: Any, continuing_with: Any
) -> None:
    evaluation = pb.EvaluationOptions(answer_format="last_number", pass_at_k=[1])
    with serving(make_pair(continuing_with("4"), continuing_with("4"))) as live:
        response = live.client.compare(pb.CompareRequest(prompt="?", evaluation=evaluation))
    assert response.agreement.same_answer
    assert dict(response.agreement.student_pass_at_k) == {1: 1.0}
    assert response.agreement.reference_kind == pb.REFERENCE_KIND_TEACHER_CONSENSUS
    assert not any(sample.HasField("correct") for sample in response.samples)


def test_no_majority_of_the_teacher_leaves_no_reference(
    serving: Any, make_pair: Any, continuing_with: Any
) -> None:
    evaluation = pb.EvaluationOptions(answer_format="last_number", pass_at_k=[1])
    with serving(make_pair(continuing_with("4"), continuing_with("abc"))) as live:
        agreement = live.client.compare(
            pb.CompareRequest(prompt="?", evaluation=evaluation)
        ).agreement
    assert agreement.teacher.num_valid == 0 and not agreement.teacher.HasField("share")
    assert not agreement.HasField("same_answer")
    assert not agreement.student_pass_at_k
    assert agreement.reference_kind == pb.REFERENCE_KIND_UNSPECIFIED


def test_sample_that_ends_in_the_reasoning_that_its_prompt_opened_has_no_answer(
    serving: Any, make_pair: Any, continuing_with: Any, tokenizer: Any
) -> None:
    says_4 = continuing_with("4")
    says_4[tokenizer.encode(">")] = says_4[tokenizer.encode("?")]
    evaluation = pb.EvaluationOptions(answer_format="last_number", reference_answer="4")
    with serving(make_pair(says_4, says_4)) as live:
        for prompt, is_read in (("?", True), ("<think>?", True), ("<think>", False)):
            request = pb.CompareRequest(prompt=prompt, evaluation=evaluation)
            samples = live.client.compare(request).samples
            assert [(s.text, s.HasField("answer"), s.correct) for s in samples] == [
                ("4", is_read, is_read)
            ] * 2


def test_no_agreement_without_an_answer_format(live: Any) -> None:
    assert not live.client.compare(pb.CompareRequest(prompt="x")).HasField("agreement")


# Generate


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


def test_stream_brings_exact_and_per_token_divergence(live: Any) -> None:
    request = pb.GenerateRequest(
        prompt="x",
        route=pb.ROUTE_TEACHER,
        sampling=pb.SamplingParams(num_samples=2, max_tokens=12),
        divergence=pb.DivergenceOptions(exact=True, per_token=True),
    )
    samples = live.client.generate(request).result().samples
    assert len(samples) == 2
    for sample in samples:
        divergence = sample.divergence
        assert divergence.exact_mean >= 0 and 0 <= divergence.predicted_acceptance <= 1
        assert len(divergence.per_token_k3) == len(sample.token_ids)
        assert sum(divergence.per_token_k3) == pytest.approx(divergence.k3_sum)


def test_without_stream_only_the_final_events_come(live: Any) -> None:
    events = generate(live, prompt="x", output=pb.OutputOptions(stream=False))
    assert [event.WhichOneof("event") for event in events] == ["complete", "usage"]


def test_auto_lets_the_student_answer_and_the_teacher_score(live: Any) -> None:
    for route in (pb.ROUTE_UNSPECIFIED, pb.ROUTE_AUTO):
        (sample,) = completes(generate(live, prompt="x", route=route))
        assert sample.role == pb.ROLE_STUDENT
        assert sample.divergence.reference == pb.ROLE_TEACHER


def test_teacher_samples_are_scored_by_the_student(live: Any) -> None:
    (sample,) = completes(generate(live, prompt="x", route=pb.ROUTE_TEACHER))
    assert sample.role == sample.divergence.policy == pb.ROLE_TEACHER
    assert sample.divergence.reference == pb.ROLE_STUDENT


def test_messages_go_through_the_chat_template(live: Any) -> None:
    messages = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="Hi")])
    events = generate(live, messages=messages, sampling=pb.SamplingParams(max_tokens=1))
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = live.pair.engines.student.tokenizer
    assert events[-1].usage.roles[0].prompt_tokens == len(tokenizer.encode(text))


def test_cancelled_stream_frees_its_slots(serving: Any, make_pair: Any) -> None:
    pair = make_pair(max_model_len=5000)
    engine = pair.engines.student.engine
    is_cancelled = threading.Event()
    pair.metrics.samples.labels("student", "cancelled")  # made before it is watched
    observer = engine._observer
    observer.on_finished = lambda reason: is_cancelled.set()
    with serving(pair) as live:
        sampling = pb.SamplingParams(max_tokens=4000, ignore_eos=True)
        stream = live.client.generate(pb.GenerateRequest(prompt="x", sampling=sampling))
        next(stream)
        stream.close()
        assert is_cancelled.wait(10)
        assert generate(live, prompt="x")[-1].HasField("usage")
    assert engine.load().num_running == engine.load().num_waiting == 0
    assert pair.value("requests_total", **labels("Generate", "auto", "CANCELLED")) == 1


def test_deadline_ends_a_queued_request(serving: Any, make_pair: Any) -> None:
    pair = make_pair()
    with serving(pair) as live:
        pair.backends[Role.STUDENT].may_run.clear()
        error = failure(lambda: live.client.compare(pb.CompareRequest(prompt="x"), timeout_s=0.1))
        assert error.code() is CODE.DEADLINE_EXCEEDED
        pair.backends[Role.STUDENT].may_run.set()
        assert generate(live, prompt="x")


# Score


def test_score_gives_the_logprobs_of_a_sample_back(live: Any) -> None:
    sampling = pb.SamplingParams(num_samples=2, temperature=0.8, max_tokens=12)
    response = live.client.compare(pb.CompareRequest(prompt="x", sampling=sampling))
    sample = response.samples[1]
    completion = pb.Completion(token_ids=pb.TokenIds(ids=sample.token_ids))
    scored = live.client.score(
        pb.ScoreRequest(prompt="x", completions=[completion], temperature=0.8)
    )
    student, teacher = scored.scores
    assert (student.role, teacher.role) == (pb.ROLE_STUDENT, pb.ROLE_TEACHER)
    np.testing.assert_allclose(student.logprobs, sample.logprobs, atol=1e-3)
    np.testing.assert_allclose(teacher.logprobs, sample.divergence.reference_logprobs, atol=1e-3)
    assert student.sum_logprob == pytest.approx(sum(student.logprobs))
    assert student.divergence.k3_sum == pytest.approx(sample.divergence.k3_sum, abs=1e-5)
    assert teacher.divergence.policy == pb.ROLE_TEACHER


def test_greedy_sample_is_greedy_to_its_own_model_alone(live: Any) -> None:
    sampling = pb.SamplingParams(temperature=0, max_tokens=12)
    sample = live.client.compare(pb.CompareRequest(prompt="x", sampling=sampling)).samples[0]
    completion = pb.Completion(token_ids=pb.TokenIds(ids=sample.token_ids))
    scored = live.client.score(pb.ScoreRequest(prompt="x", completions=[completion]))
    student, teacher = (list(score.is_greedy) for score in scored.scores)
    assert student == [True] * len(sample.token_ids)
    assert len(teacher) == len(student) and not all(teacher)


@pytest.mark.parametrize("basis", [pb.BASIS_TEMPERED, pb.BASIS_RAW])
def test_score_reports_the_basis_asked_for(live: Any, basis: pb.Basis) -> None:
    completions, divergence = [pb.Completion(text="y")], pb.DivergenceOptions(basis=basis)
    request = pb.ScoreRequest(prompt="x", completions=completions, divergence=divergence)
    assert {s.divergence.basis for s in live.client.score(request).scores} == {basis}


def test_last_token_completes_the_text(live: Any) -> None:
    sampling = pb.SamplingParams(num_samples=32, max_tokens=7, ignore_eos=True, seed=3)
    request = pb.GenerateRequest(prompt="x", route=pb.ROUTE_STUDENT, sampling=sampling)
    samples = live.client.generate(request).result().samples
    assert all(sample.text_ends[-1] == len(sample.text) for sample in samples)
    assert any(sample.text.endswith("\ufffd") for sample in samples)


def test_score_takes_text_and_one_role(live: Any) -> None:
    completions = [pb.Completion(text="ab"), pb.Completion(text="c")]
    response = live.client.score(
        pb.ScoreRequest(prompt="x", completions=completions, roles=[pb.ROLE_TEACHER])
    )
    assert [(s.role, s.index, len(s.token_ids)) for s in response.scores] == [
        (pb.ROLE_TEACHER, 0, 2),
        (pb.ROLE_TEACHER, 1, 1),
    ]
    assert not any(score.HasField("divergence") for score in response.scores)
    assert response.usage.roles[0].completion_tokens == 3


def test_score_with_exact_divergence(live: Any) -> None:
    completions = [pb.Completion(text="ab"), pb.Completion(text="c")]
    options = pb.DivergenceOptions(exact=True)
    response = live.client.score(
        pb.ScoreRequest(prompt="x", completions=completions, divergence=options)
    )
    student, teacher = response.scores[:2], response.scores[2:]
    for one, other in zip(student, teacher, strict=True):
        assert one.divergence.exact_mean > 0 and other.divergence.exact_mean > 0
        assert one.divergence.argmax_agreement == other.divergence.argmax_agreement


def test_divergence_of_one_scored_role_is_refused(live: Any) -> None:
    request = pb.ScoreRequest(
        prompt="x",
        completions=[pb.Completion(text="a")],
        roles=[pb.ROLE_STUDENT],
        divergence=pb.DivergenceOptions(enabled=True),
    )
    assert failure(lambda: live.client.score(request)).code() is CODE.FAILED_PRECONDITION


def test_completion_over_the_context_is_out_of_range(live: Any) -> None:
    completion = pb.Completion(text="a" * 256)
    error = failure(
        lambda: live.client.score(pb.ScoreRequest(prompt="x", completions=[completion]))
    )
    assert error.code() is CODE.OUT_OF_RANGE
    assert list(violations(error)) == ["completions[0]"]


# Bad input


@pytest.mark.parametrize(
    ("fields", "code", "path"),
    [
        ({"prompt": ""}, CODE.INVALID_ARGUMENT, "prompt"),
        (
            {"prompt": "x", "sampling": {"temperature": float("nan")}},
            CODE.INVALID_ARGUMENT,
            "sampling.temperature",
        ),
        (
            {"prompt": "x", "evaluation": {"answer_format": "boxed", "pass_at_k": [2]}},
            CODE.INVALID_ARGUMENT,
            "evaluation.pass_at_k[0]",
        ),
        (
            {"prompt": "x", "sampling": {"max_tokens": 256}},
            CODE.OUT_OF_RANGE,
            "sampling.max_tokens",
        ),
        ({"prompt": "x" * 256}, CODE.OUT_OF_RANGE, "prompt"),
        ({"prompt": "x", "route": 77}, CODE.INVALID_ARGUMENT, "route"),
        ({"prompt": "x", "divergence": {"basis": 5}}, CODE.INVALID_ARGUMENT, "divergence.basis"),
        (
            {"prompt_token_ids": {"ids": [259]}},
            CODE.INVALID_ARGUMENT,
            "prompt_token_ids.ids[0]",
        ),
    ],
)
def test_bad_input_gets_its_status_and_the_server_goes_on(
    live: Any, fields: dict[str, Any], code: grpc.StatusCode, path: str
) -> None:
    error = failure(lambda: generate(live, **fields))
    assert (error.code(), list(violations(error))) == (code, [path])
    assert generate(live, prompt="x")[-1].HasField("usage")


def raw(live: Any, rpc: str, data: bytes) -> Any:
    return live.channel.unary_unary(f"/tandem.v1.InferenceService/{rpc}")(data, timeout=10)


@pytest.mark.parametrize("rpc", ["Compare", "Score"])
@pytest.mark.parametrize("data", [b"\xff\xff", b"\x1a\x02\xff\xfe"])
def test_malformed_bytes_are_an_invalid_argument(live: Any, rpc: str, data: bytes) -> None:
    error = failure(lambda: raw(live, rpc, data))
    assert error.code() is CODE.INVALID_ARGUMENT
    assert error.details() == f"the request is not a valid tandem.v1.{rpc}Request"


def test_prompt_and_ids_together_are_an_invalid_argument(live: Any) -> None:
    data = pb.CompareRequest(prompt="x").SerializeToString()
    data += pb.CompareRequest(prompt_token_ids=pb.TokenIds(ids=[5])).SerializeToString()
    error = failure(lambda: raw(live, "Compare", data))
    assert error.code() is CODE.INVALID_ARGUMENT
    assert list(violations(error)) == ["prompt", "prompt_token_ids"]


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


def test_seed_follows_from_a_given_request_id(serving: Any, make_pair: Any) -> None:
    seeds = []
    for _ in range(2):
        with serving(make_pair()) as live:
            seeds.append(generate(live, prompt="x", request_id="mine")[-1].usage.seed)
            assert generate(live, prompt="x", request_id="other")[-1].usage.seed != seeds[0]
    assert seeds[0] == seeds[1]


# One model, or two that do not fit


def test_compare_needs_both_models(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(roles=(Role.STUDENT,))) as live:
        error = failure(lambda: live.client.compare(pb.CompareRequest(prompt="x")))
        assert error.code() is CODE.FAILED_PRECONDITION
        error = failure(lambda: generate(live, prompt="x", route=pb.ROUTE_TEACHER))
        assert error.code() is CODE.NOT_FOUND
        wanted = pb.DivergenceOptions(enabled=True)
        error = failure(lambda: generate(live, prompt="x", divergence=wanted))
        assert error.code() is CODE.FAILED_PRECONDITION
        (sample,) = completes(generate(live, prompt="x"))
        assert not sample.HasField("divergence") and not sample.divergence_error


def test_auto_takes_the_teacher_when_it_is_alone(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(roles=(Role.TEACHER,))) as live:
        (sample,) = completes(generate(live, prompt="x"))
    assert sample.role == pb.ROLE_TEACHER


def test_different_tokenizers_have_no_divergence(
    serving: Any, make_pair: Any, make_tokenizer: Any
) -> None:
    other = make_tokenizer(extra="<|more|>")
    pair = make_pair(tokenizers_by_role={Role.TEACHER: other})
    with serving(pair) as live:
        error = failure(lambda: live.client.compare(pb.CompareRequest(prompt="x")))
        assert error.code() is CODE.FAILED_PRECONDITION
        assert other.hash in error.details()
        assert pair.engines.student.tokenizer.hash in error.details()
        off = pb.DivergenceOptions(enabled=False)
        assert live.client.compare(pb.CompareRequest(prompt="x", divergence=off)).samples


# Failures


def test_failed_teacher_does_not_fail_the_student(serving: Any, make_pair: Any) -> None:
    pair = make_pair()
    pair.backends[Role.TEACHER].error = RuntimeError("secret: out of memory")
    with serving(pair) as live:
        sampling = pb.SamplingParams(num_samples=2)
        response = live.client.compare(
            pb.CompareRequest(prompt="x", sampling=sampling, evaluation=MATH)
        )
    student, teacher = response.samples[:2], response.samples[2:]
    for sample in student:
        assert sample.finish_reason in (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)
        assert not sample.HasField("divergence")
        assert "engine failed" in sample.divergence_error
    for sample in teacher:
        assert sample.finish_reason == pb.FINISH_REASON_ERROR
        assert "engine failed" in sample.error and "secret" not in sample.error
    assert response.agreement.HasField("student")
    assert not response.agreement.HasField("teacher")
    assert not response.agreement.HasField("same_answer")
    for outcome in ("agree", "disagree", "no_majority", "invalid"):
        assert pair.value("consensus_total", outcome=outcome, task="other") == 0


def test_failed_teacher_leaves_a_routed_student_alone(serving: Any, make_pair: Any) -> None:
    pair = make_pair()
    pair.backends[Role.TEACHER].error = RuntimeError()
    with serving(pair) as live:
        (sample,) = completes(generate(live, prompt="x"))
    assert sample.token_ids and sample.divergence_error


def test_token_of_the_teacher_alone_leaves_the_divergence_out(
    serving: Any, make_pair: Any, tokenizer: Any
) -> None:
    size = tokenizer.num_tokens
    logits = torch.zeros(size + 1, size + 1)
    logits[:, size] = 50.0  # what pads a vocabulary to a round size is a token as others are
    with serving(make_pair(teacher=logits)) as live:
        for _ in range(MAX_FAILED_STEPS):
            request = pb.GenerateRequest(prompt="x", route=pb.ROUTE_BOTH)
            student, teacher = live.client.generate(request).result().samples
            assert student.HasField("divergence") and teacher.token_ids[0] == size
            assert f"the student has no token {size}" in teacher.divergence_error
        assert live.pair.value("model_up", role="student")


def test_text_with_a_token_that_the_model_lacks_is_the_callers_error(
    serving: Any, make_pair: Any
) -> None:
    completion = pb.Completion(text="é")
    with serving(make_pair(student=torch.zeros(100, 100), roles=(Role.STUDENT,))) as live:
        score = pb.ScoreRequest(prompt="a", completions=[completion])
        for call in (lambda: generate(live, prompt="é"), lambda: live.client.score(score)):
            error = failure(call)
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "with the id 130; the student knows tokens" in error.details()
        assert live.pair.value("model_up", role="student")


def test_nonfinite_reference_leaves_the_divergence_out(serving: Any, make_pair: Any) -> None:
    pair = make_pair()
    pair.backends[Role.TEACHER].logits[:] = float("nan")
    with serving(pair) as live:
        (sample,) = completes(generate(live, prompt="x"))
    assert sample.token_ids and not sample.HasField("divergence")
    assert sample.divergence_error == "the teacher returned non-finite logits"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nonfinite_logits_are_internal_with_an_error_id(
    serving: Any, make_pair: Any, temperature: float
) -> None:
    pair = make_pair()
    pair.backends[Role.STUDENT].logits[:] = float("nan")
    with serving(pair) as live:
        sampling = pb.SamplingParams(temperature=temperature)
        error = failure(lambda: generate(live, prompt="x", sampling=sampling))
    assert error.code() is CODE.INTERNAL
    assert "non-finite logits; error id " in error.details()


def test_bug_is_internal_without_its_text(
    serving: Any, make_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair()

    def buggy(*_: Any) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(pair.engines.student.engine, "submit", buggy)
    with serving(pair) as live:
        error = failure(lambda: generate(live, prompt="x"))
    assert error.code() is CODE.INTERNAL
    assert error.details().startswith("internal error; error id ")
    assert "secret" not in str(error.trailing_metadata()) + error.details()


def test_full_queue_says_when_to_retry(serving: Any, make_pair: Any) -> None:
    pair = make_pair(max_num_seqs=2, max_waiting=1)
    with serving(pair) as live:
        sampling = pb.SamplingParams(num_samples=4)
        error = failure(lambda: generate(live, prompt="x", sampling=sampling))
    assert error.code() is CODE.RESOURCE_EXHAUSTED
    assert retry_delay_s(error) == 1.0
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
    assert pair.value("admission_rejections_total", reason="queue_full") == 1


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


# GetModels


def test_models_are_described(live: Any) -> None:
    student, teacher = live.client.get_models().models
    assert (student.role, teacher.role) == (pb.ROLE_STUDENT, pb.ROLE_TEACHER)
    assert student.tokenizer_hash == teacher.tokenizer_hash
    assert (student.max_model_len, student.max_num_seqs, student.vocab_size) == (256, 8, 259)
    assert (student.backend, student.device, student.precision) == ("fake", "cpu", "float32")
    assert student.batch_invariant


def labels(rpc: str, route: str, code: str) -> dict[str, str]:
    return {"rpc": rpc, "route": route, "code": code, "task": "other"}


def test_every_finish_reason_has_a_name_on_the_wire() -> None:
    names = {f"FINISH_REASON_{reason.name}" for reason in FinishReason}
    assert names | {"FINISH_REASON_UNSPECIFIED"} == set(pb.FinishReason.keys())
