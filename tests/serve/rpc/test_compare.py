"""Compare through a real channel, over real engines and fake models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from protos.tandem.v1 import inference_pb2 as pb
from serve.engine.engine import MAX_FAILED_STEPS
from serve.pair.served import Role

MATH = pb.EvaluationOptions(answer_format="last_number")
TURN = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_k_sums_recompute_from_returned_logprobs(live: Any, temperature: float) -> None:
    sampling = pb.SamplingParams(num_samples=8, temperature=temperature, max_tokens=20)
    options = pb.DivergenceOptions(per_token=True)
    request = pb.CompareRequest(prompt="1+1=", sampling=sampling, divergence=options)
    samples = live.client.compare(request).samples
    order = [(sample.role, sample.index) for sample in samples]
    assert order == [(role, i) for role in (pb.ROLE_STUDENT, pb.ROLE_TEACHER) for i in range(8)]
    for sample in samples:
        d = sample.divergence
        x = np.array(d.reference_logprobs) - np.array(sample.logprobs)
        assert len(x) == len(sample.token_ids) == d.num_tokens
        expected = (-x.sum(), (x**2).sum() / 2, (np.expm1(x) - x).sum())
        np.testing.assert_allclose((d.k1_sum, d.k2_sum, d.k3_sum), expected, atol=1e-5)
        assert d.k3_mean == pytest.approx(d.k3_sum / d.num_tokens)
        assert sum(d.per_token_k3) == pytest.approx(d.k3_sum)
        assert d.policy == sample.role and d.reference == 3 - sample.role
        assert d.truncated == (d.basis == pb.BASIS_RAW) == (temperature == 0)


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
    sampling = pb.SamplingParams(top_k=5, max_tokens=4)
    samples = live.client.compare(pb.CompareRequest(prompt="x", sampling=sampling)).samples
    assert all(sample.divergence.truncated for sample in samples)


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
    expected = list(live.pair.engines.student.tokenizer.encode(TURN))
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


def test_nonfinite_reference_leaves_the_divergence_out(serving: Any, make_pair: Any) -> None:
    pair = make_pair()
    pair.backends[Role.TEACHER].logits[:] = float("nan")
    with serving(pair) as live:
        (sample,) = live.client.generate(pb.GenerateRequest(prompt="x")).result().samples
    assert sample.token_ids and not sample.HasField("divergence")
    assert sample.divergence_error == "the teacher returned non-finite logits"
