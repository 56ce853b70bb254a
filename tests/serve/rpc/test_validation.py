import math
from dataclasses import replace
from typing import Any

import pytest

from protos.tandem.v1 import control_pb2
from protos.tandem.v1 import inference_pb2 as pb
from serve.errors import InvalidFieldError, TooManyTokensError
from serve.pair.request import Basis, Limits, Range
from serve.pair.routing import Route, TrafficPolicy
from serve.pair.served import Role
from serve.rpc.validation import (
    validate_abort,
    validate_compare,
    validate_generate,
    validate_score,
    validate_set_policy,
)

LIMITS = Limits(max_model_len=100, vocab_size=50, tasks=frozenset({"math"}))


def refused(request: pb.GenerateRequest | pb.ScoreRequest) -> list[str]:
    validate = validate_score if isinstance(request, pb.ScoreRequest) else validate_generate
    with pytest.raises(InvalidFieldError) as caught:
        validate(request, LIMITS)
    return [violation.field for violation in caught.value.violations]


def test_defaults_are_the_documented_ones() -> None:
    spec = validate_generate(pb.GenerateRequest(prompt="x"), LIMITS)
    assert (spec.sampling.num_samples, spec.sampling.max_tokens) == (1, 128)
    assert spec.sampling.temperature == 1.0
    assert (spec.route, spec.basis, spec.divergence.enabled) == (Route.AUTO, Basis.TEMPERED, None)
    assert (spec.output.stream, spec.output.logprobs, spec.output.text) == (True, True, True)
    assert (spec.evaluation.answer_format, spec.evaluation.task) == ("none", "other")


def test_unset_seed_and_id_are_drawn_anew() -> None:
    specs = [validate_generate(pb.GenerateRequest(prompt="x"), LIMITS) for _ in range(2)]
    assert specs[0].sampling.seed != specs[1].sampling.seed
    assert specs[0].request_id != specs[1].request_id


def test_unset_seed_follows_from_a_given_request_id() -> None:
    requests = [pb.GenerateRequest(prompt="x", request_id=name) for name in ("a", "a", "b")]
    first, again, other = (validate_generate(each, LIMITS).sampling.seed for each in requests)
    assert first == again != other


def test_seed_that_is_chosen_here_is_a_whole_number_in_javascript() -> None:
    """Given ones stay as they are."""
    unnamed = [pb.GenerateRequest(prompt="x") for _ in range(100)]
    named = [pb.GenerateRequest(prompt="x", request_id=f"r{i}") for i in range(100)]
    seeds = [validate_generate(request, LIMITS).sampling.seed for request in (*unnamed, *named)]
    assert all(int(float(seed)) == seed < 2**53 for seed in seeds)
    assert all(any(seed >> bit & 1 for seed in seeds) for bit in range(53))
    given = pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(seed=2**64 - 1))
    assert validate_generate(given, LIMITS).sampling.seed == 2**64 - 1


def test_zero_is_not_unset() -> None:
    sampling = pb.SamplingParams(temperature=0, seed=0)
    spec = validate_generate(pb.GenerateRequest(prompt="x", sampling=sampling), LIMITS)
    assert (spec.sampling.temperature, spec.sampling.seed) == (0.0, 0)
    assert refused(pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(num_samples=0)))


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 65}, "num_samples"),
        ({"num_samples": 2**32 - 1}, "num_samples"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": -math.inf}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"temperature": 10.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_p": math.inf}, "top_p"),
        ({"top_k": 51}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 2}, "min_p"),
        ({"min_p": math.nan}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ["x", ""]}, "stop[1]"),
        ({"stop": ["x" * 257]}, "stop[0]"),
        ({"stop_token_ids": [50]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
    ],
)
def test_sampling_out_of_bounds_names_the_field(sampling: dict[str, object], field: str) -> None:
    request = pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(**sampling))
    assert refused(request) == [f"sampling.{field}"]


@pytest.mark.parametrize(
    ("request_fields", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "x" * (1 << 20) + "x"}, "prompt"),
        ({"messages": {}}, "messages.messages"),
        ({"messages": {"continue_final_message": True}}, "messages.messages"),
        ({"messages": {"messages": [{"role": "user"}] * 257}}, "messages.messages"),
        ({"messages": {"messages": [{"role": "robot"}]}}, "messages.messages[0].role"),
        (
            {"messages": {"messages": [{"role": "user"}], "continue_final_message": True}},
            "messages.continue_final_message",
        ),
        ({"prompt_token_ids": {}}, "prompt_token_ids.ids"),
        ({"prompt_token_ids": {"ids": [1, 50]}}, "prompt_token_ids.ids[1]"),
        ({"prompt": "x", "route": 9}, "route"),
        ({"prompt": "x", "request_id": "a\nb"}, "request_id"),
        ({"prompt": "x", "request_id": "x" * 129}, "request_id"),
        ({"prompt": "x", "divergence": {"basis": 7}}, "divergence.basis"),
        ({"prompt": "x", "evaluation": {"answer_format": "json"}}, "evaluation.answer_format"),
        ({"prompt": "x", "evaluation": {"reference_answer": "4"}}, "evaluation.answer_format"),
        ({"prompt": "x", "evaluation": {"pass_at_k": [1]}}, "evaluation.answer_format"),
        ({"prompt": "x", "evaluation": {"answer_match": 9}}, "evaluation.answer_match"),
        ({"prompt": "x", "evaluation": {"task": "x" * 65}}, "evaluation.task"),
        ({"prompt": "x", "output": {"top_logprobs": 21}}, "output.top_logprobs"),
    ],
)
def test_bad_request_names_the_field(request_fields: dict[str, object], field: str) -> None:
    assert refused(pb.GenerateRequest(**request_fields)) == [field]


@pytest.mark.parametrize(
    ("request_fields", "field"),
    [
        ({"prompt_token_ids": {"ids": [1, 7]}}, "prompt_token_ids.ids[1]"),
        ({"prompt": "x", "sampling": {"stop_token_ids": [7]}}, "sampling.stop_token_ids[0]"),
    ],
)
def test_id_that_no_token_has_is_refused(request_fields: dict[str, object], field: str) -> None:
    limits = replace(LIMITS, missing_token_ids=frozenset({7}))
    with pytest.raises(InvalidFieldError, match="is 7; must be the id of a token") as caught:
        validate_generate(pb.GenerateRequest(**request_fields), limits)
    assert [violation.field for violation in caught.value.violations] == [field]


@pytest.mark.parametrize(
    ("evaluation", "field"),
    [
        ({"pass_at_k": [2]}, "evaluation.pass_at_k[0]"),
        ({"pass_at_k": [1, 0]}, "evaluation.pass_at_k[1]"),
        ({"pass_at_k": [1] * 17}, "evaluation.pass_at_k"),
        ({"reference_answer": " "}, "evaluation.reference_answer"),
        ({"reference_answer": ""}, "evaluation.reference_answer"),
        ({"reference_answer": "x" * 4097}, "evaluation.reference_answer"),
    ],
)
def test_bad_evaluation_names_the_field(evaluation: dict[str, object], field: str) -> None:
    options = pb.EvaluationOptions(answer_format="boxed", **evaluation)
    assert refused(pb.GenerateRequest(prompt="x", evaluation=options)) == [field]


@pytest.mark.parametrize(
    ("request_fields", "field"),
    [
        ({"completions": []}, "completions"),
        ({"completions": [{"text": "a"}] * 65}, "completions"),
        ({"completions": [{}]}, "completions[0]"),
        ({"completions": [{"text": ""}]}, "completions[0].text"),
        ({"completions": [{"token_ids": {}}]}, "completions[0].token_ids.ids"),
        ({"completions": [{"token_ids": {"ids": [50]}}]}, "completions[0].token_ids.ids[0]"),
        ({"roles": [0]}, "roles[0]"),
        ({"roles": [1, 5]}, "roles[1]"),
        ({"roles": [1, 1]}, "roles"),
        ({"roles": [1, 2] * 1000}, "roles"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": 2, "divergence": {"basis": pb.BASIS_RAW}}, "divergence.basis"),
    ],
)
def test_bad_score_request_names_the_field(request_fields: dict[str, object], field: str) -> None:
    fields = {"prompt": "x", "completions": [{"text": "a"}], **request_fields}
    assert refused(pb.ScoreRequest(**fields)) == [field]


def test_all_refused_fields_are_reported_together() -> None:
    sampling = pb.SamplingParams(temperature=math.nan, top_p=2)
    request = pb.GenerateRequest(prompt="", sampling=sampling)
    assert sorted(refused(request)) == ["prompt", "sampling.temperature", "sampling.top_p"]


def test_violation_says_what_was_given_and_what_is_allowed() -> None:
    sampling = pb.SamplingParams(temperature=math.nan, num_samples=70)
    with pytest.raises(InvalidFieldError) as caught:
        validate_generate(pb.GenerateRequest(prompt="x", sampling=sampling), LIMITS)
    assert [v.description for v in caught.value.violations] == [
        "is 70; must be 1 to 64",
        "is nan; must be 0, or 0.01 to 10",
    ]


def test_many_violations_fit_into_trailers() -> None:
    ids = pb.TokenIds(ids=[99] * 90)
    assert len(refused(pb.GenerateRequest(prompt_token_ids=ids))) == 16


@pytest.mark.parametrize(
    ("message", "validate", "path"),
    [
        (pb.GenerateRequest, validate_generate, "prompt_token_ids.ids"),
        (pb.ScoreRequest, validate_score, "completions[0].token_ids.ids"),
    ],
)
def test_more_ids_than_the_context_are_not_even_copied(
    message: Any, validate: Any, path: str
) -> None:
    ids = pb.TokenIds(ids=[1] * (LIMITS.max_model_len + 1))
    fields = (
        {"prompt_token_ids": ids}
        if message is pb.GenerateRequest
        else {"prompt": "x", "completions": [pb.Completion(token_ids=ids)]}
    )
    with pytest.raises(TooManyTokensError) as caught:
        validate(message(**fields), LIMITS)
    assert caught.value.field == path


def test_score_roles_keep_their_order() -> None:
    request = pb.ScoreRequest(prompt="x", completions=[pb.Completion(text="a")], roles=[2, 1])
    assert validate_score(request, LIMITS).roles == (Role.TEACHER, Role.STUDENT)


def test_compare_wants_both_models() -> None:
    assert validate_compare(pb.CompareRequest(prompt="x"), LIMITS).route is Route.BOTH


@pytest.mark.parametrize(
    ("temperature", "basis", "expected"),
    [
        (0.5, pb.BASIS_UNSPECIFIED, (Basis.TEMPERED, 0.5)),
        (0.5, pb.BASIS_RAW, (Basis.RAW, 1.0)),
        (0.0, pb.BASIS_TEMPERED, (Basis.RAW, 1.0)),
    ],
)
def test_basis_of_logprobs(
    temperature: float, basis: pb.Basis, expected: tuple[Basis, float]
) -> None:
    request = pb.GenerateRequest(
        prompt="x",
        sampling=pb.SamplingParams(temperature=temperature),
        divergence=pb.DivergenceOptions(basis=basis),
    )
    spec = validate_generate(request, LIMITS)
    assert (spec.basis, spec.logprob_temperature) == expected


@pytest.mark.parametrize(("task", "label"), [("math", "math"), ("<script>", "other")])
def test_task_outside_the_allow_list_counts_as_other(task: str, label: str) -> None:
    evaluation = pb.EvaluationOptions(task=task)
    spec = validate_generate(pb.GenerateRequest(prompt="x", evaluation=evaluation), LIMITS)
    assert spec.evaluation.task == label


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"student_weight": -1}, "student_weight"),
        ({"teacher_weight": math.nan}, "teacher_weight"),
        ({"shadow_rate": 1.5}, "shadow_rate"),
        ({"student_weight": 0}, "student_weight"),
    ],
)
def test_bad_policy_names_the_field(fields: dict[str, float], path: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        validate_set_policy(control_pb2.SetPolicyRequest(**fields), TrafficPolicy())
    assert [violation.field for violation in caught.value.violations] == [path]


@pytest.mark.parametrize("request_id", ["", "x" * 20_000])
def test_abort_without_an_id_that_may_be_is_refused(request_id: str) -> None:
    with pytest.raises(InvalidFieldError, match=r"request_id: has .* characters; must name"):
        validate_abort(control_pb2.AbortRequest(request_id=request_id))


def test_range_tests_finiteness_first() -> None:
    assert not Range(0, math.inf).allows(math.inf)
    assert not Range(0, 1, or_zero=True).allows(math.nan)
