"""Messages in, checked and complete requests out.

Every bound is in `serve.pair.request.Limits`. All refused fields of a message are reported
together, by path. What needs the tokenizer comes behind it, in `serve.pair.admission`.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from estimators.canonical import canonicalise
from protos.tandem.v1 import control_pb2 as control_pb
from protos.tandem.v1 import inference_pb2 as pb
from serve.errors import InvalidFieldError, TooManyTokensError
from serve.pair.request import (
    OTHER_TASK,
    AnswerMatch,
    Basis,
    DivergenceSpec,
    EvaluationSpec,
    GenerationSpec,
    Limits,
    OutputSpec,
    Prompt,
    Range,
    ScoreSpec,
)
from serve.pair.routing import Route, TrafficPolicy
from serve.pair.served import Role
from serve.rpc.checks import Checks, quoted
from serve.sampling.params import SamplingParams

WEIGHT = Range(0, 1e6)
MAX_NAME_CHARS = 128
CHAT_ROLES = ("system", "user", "assistant")
# Of the seeds that are chosen here: a double, JavaScript's only number, keeps so many.
_SEED_BITS = 53


def validate_generate(request: pb.GenerateRequest, limits: Limits) -> GenerationSpec:
    """Check a Generate request and fill in its defaults; InvalidFieldError names each bad field."""
    checks = Checks()
    route = checks.enum(request, "route", Route, Route.AUTO)
    return _validate_generation(request, route, limits, checks)


def validate_compare(request: pb.CompareRequest, limits: Limits) -> GenerationSpec:
    """As `validate_generate`; a Compare request has no route, both models answer."""
    return _validate_generation(request, Route.BOTH, limits, Checks())


def _validate_generation(
    request: pb.GenerateRequest | pb.CompareRequest, route: Route, limits: Limits, checks: Checks
) -> GenerationSpec:
    sampling = _sampling(request, limits, checks)
    spec = GenerationSpec(
        request_id=_request_id(request, checks),
        route=route,
        prompt=_prompt(request, limits, checks),
        sampling=sampling,
        stop=_stop_strings(request.sampling.stop, limits, checks),
        divergence=_divergence(request.divergence, checks),
        evaluation=_evaluation(request.evaluation, sampling.num_samples, limits, checks),
        output=_output(request.output, limits, checks),
        cache_salt=_name(request, "cache_salt", checks),
        is_max_tokens_default=not request.sampling.HasField("max_tokens"),
    )
    checks.raise_if_any()
    return spec


def validate_score(request: pb.ScoreRequest, limits: Limits) -> ScoreSpec:
    """Check a Score request and fill in its defaults; InvalidFieldError names each bad field."""
    checks = Checks()
    spec = ScoreSpec(
        request_id=_request_id(request, checks),
        prompt=_prompt(request, limits, checks),
        completions=_completions(request.completions, limits, checks),
        roles=_roles(request.roles, checks),
        temperature=checks.number(request, "temperature", limits.scoring_temperature, 1.0),
        divergence=_divergence(request.divergence, checks),
        cache_salt=_name(request, "cache_salt", checks),
        returns_prompt_token_ids=request.return_prompt_token_ids,
    )
    if spec.divergence.basis is Basis.RAW and spec.temperature != 1.0:
        checks.refuse("divergence.basis", "BASIS_RAW", f"unset at temperature {spec.temperature}")
    checks.raise_if_any()
    return spec


def validate_set_policy(
    request: control_pb.SetPolicyRequest, current: TrafficPolicy
) -> TrafficPolicy:
    """Return the policy with what the request changes; InvalidFieldError names each bad field."""
    checks = Checks()
    weights = {
        name: checks.number(request, name, WEIGHT, getattr(current, name))
        for name in ("student_weight", "teacher_weight")
    }
    shadow_rate = checks.number(request, "shadow_rate", Range(0, 1), current.shadow_rate)
    checks.raise_if_any()
    if not any(weights.values()):
        raise InvalidFieldError.of(
            "student_weight", "is 0 and so is teacher_weight; one of them must be above 0"
        )
    return replace(current, **weights, shadow_rate=shadow_rate)


def validate_abort(request: control_pb.AbortRequest) -> str:
    """Return the id of the request to end."""
    if not 0 < len(request.request_id) <= MAX_NAME_CHARS:
        raise InvalidFieldError.of(
            "request_id",
            f"has {len(request.request_id)} characters; must name a running request, with 1 to "
            f"{MAX_NAME_CHARS} of them",
        )
    return request.request_id


# The parts of a request


def _request_id(request: Any, checks: Checks) -> str:
    """Return the id given, or a random one."""
    return _name(request, "request_id", checks) or secrets.token_hex(16)


def _name(request: Any, field: str, checks: Checks) -> str:
    """Return a text that a client may choose to name something."""
    name: str = getattr(request, field)
    if len(name) > MAX_NAME_CHARS or not (name.isascii() and name.isprintable()):
        checks.refuse(
            field,
            quoted(name),
            f"at most {MAX_NAME_CHARS} printable ASCII characters",
        )
    return name


def _prompt(request: Any, limits: Limits, checks: Checks) -> Prompt:
    match request.WhichOneof("input"):
        case "prompt":
            num_bytes = len(request.prompt.encode())
            checks.size("prompt", num_bytes, Range(1, limits.max_prompt_bytes), "bytes")
            return Prompt(text=request.prompt)
        case "messages":
            messages = _messages(request.messages.messages, limits, checks)
            is_continued = request.messages.continue_final_message
            if is_continued and messages and messages[-1][0] != "assistant":
                allowed = "false unless the last message is the assistant's"
                checks.refuse("messages.continue_final_message", "true", allowed)
            return Prompt(messages=messages, continue_final_message=is_continued)
        case "prompt_token_ids":
            ids = request.prompt_token_ids.ids
            return Prompt(token_ids=_token_ids("prompt_token_ids.ids", ids, limits, checks))
        case _:
            checks.refuse("prompt", "unset", "given, or else messages or prompt_token_ids")
            return Prompt()


def _messages(
    messages: Sequence[pb.ChatMessage], limits: Limits, checks: Checks
) -> tuple[tuple[str, str], ...]:
    path = "messages.messages"
    if not checks.size(path, len(messages), Range(1, limits.max_messages), "messages"):
        return ()
    for index, message in enumerate(messages):
        if message.role not in CHAT_ROLES:
            checks.refuse(
                f"{path}[{index}].role", quoted(message.role), f"one of {', '.join(CHAT_ROLES)}"
            )
    num_bytes = sum(len(message.content.encode()) for message in messages)
    checks.size(path, num_bytes, Range(0, limits.max_prompt_bytes), "bytes")
    return tuple((message.role, message.content) for message in messages)


def _token_ids(path: str, ids: Sequence[int], limits: Limits, checks: Checks) -> tuple[int, ...]:
    """Check ids against the vocabulary; of more than the context holds not one.

    Raises:
        TooManyTokensError: there are so many; at once, as a million take long to be copied.
    """
    if not ids:
        checks.refuse(path, "empty", "at least one token id")
    if len(ids) > limits.max_model_len:
        raise TooManyTokensError(path, len(ids), limits.max_model_len)
    _check_vocabulary(path, ids, limits, checks)
    return tuple(ids)


def _check_vocabulary(path: str, ids: Sequence[int], limits: Limits, checks: Checks) -> None:
    if max(ids, default=0) < limits.vocab_size and limits.missing_token_ids.isdisjoint(ids):
        return
    for index, token_id in enumerate(ids):
        if token_id >= limits.vocab_size:
            checks.refuse(f"{path}[{index}]", token_id, f"below {limits.vocab_size}")
        elif token_id in limits.missing_token_ids:
            checks.refuse(f"{path}[{index}]", token_id, "the id of a token, and none has this one")


def _seed(request: pb.GenerateRequest | pb.CompareRequest) -> int:
    """Return the seed given, else one that follows from the request's id, else a random one."""
    if request.sampling.HasField("seed"):
        return request.sampling.seed
    if not request.request_id:
        return secrets.randbits(_SEED_BITS)
    digest = hashlib.sha256(f"seed:{request.request_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - _SEED_BITS)


def _sampling(
    request: pb.GenerateRequest | pb.CompareRequest, limits: Limits, checks: Checks
) -> SamplingParams:
    params = request.sampling
    default = SamplingParams(max_tokens=min(128, limits.max_completion_tokens))

    def number(name: str, allowed: Range, note: str = "") -> Any:
        return checks.number(params, f"sampling.{name}", allowed, getattr(default, name), note)

    max_tokens = number("max_tokens", Range(1, limits.max_completion_tokens))
    return SamplingParams(
        num_samples=number("num_samples", limits.num_samples),
        temperature=number("temperature", limits.temperature),
        top_p=number("top_p", limits.top_p),
        top_k=number("top_k", Range(0, limits.vocab_size)),
        min_p=number("min_p", limits.min_p),
        max_tokens=max_tokens,
        min_tokens=number("min_tokens", Range(0, max_tokens), " (max_tokens)"),
        seed=_seed(request),
        stop_token_ids=_stop_token_ids(params.stop_token_ids, limits, checks),
        ignore_eos=params.ignore_eos,
        repetition_penalty=number("repetition_penalty", limits.repetition_penalty),
    )


def _stop_token_ids(ids: Sequence[int], limits: Limits, checks: Checks) -> frozenset[int]:
    path = "sampling.stop_token_ids"
    if not checks.size(path, len(ids), Range(0, limits.max_stop_token_ids), "ids"):
        return frozenset()
    _check_vocabulary(path, ids, limits, checks)
    return frozenset(ids)


def _stop_strings(stop: Sequence[str], limits: Limits, checks: Checks) -> tuple[str, ...]:
    if not checks.size("sampling.stop", len(stop), Range(0, limits.max_stop_strings), "strings"):
        return ()
    for index, text in enumerate(stop):
        allowed = Range(1, limits.max_stop_bytes)
        checks.size(f"sampling.stop[{index}]", len(text.encode()), allowed, "bytes")
    return tuple(stop)


def _divergence(options: pb.DivergenceOptions, checks: Checks) -> DivergenceSpec:
    return DivergenceSpec(
        enabled=options.enabled if options.HasField("enabled") else None,
        basis=checks.enum(options, "divergence.basis", Basis, Basis.TEMPERED),
        per_token=options.per_token,
        exact=options.exact,
    )


def _evaluation(
    options: pb.EvaluationOptions, num_samples: int, limits: Limits, checks: Checks
) -> EvaluationSpec:
    answer_format = options.answer_format or "none"
    if answer_format not in limits.answer_formats:
        checks.refuse(
            "evaluation.answer_format",
            quoted(answer_format),
            f"one of {', '.join(limits.answer_formats)}",
        )
    elif answer_format == "none" and (options.HasField("reference_answer") or options.pass_at_k):
        formats = ", ".join(name for name in limits.answer_formats if name != "none")
        checks.refuse(
            "evaluation.answer_format",
            "none",
            f"one of {formats} with reference_answer or pass_at_k",
        )
    task_bytes = len(options.task.encode())
    checks.size("evaluation.task", task_bytes, Range(0, limits.max_task_bytes), "bytes")
    return EvaluationSpec(
        answer_format=answer_format,
        reference_answer=_reference_answer(options, limits, checks),
        pass_at_k=_pass_at_k(options.pass_at_k, num_samples, limits, checks),
        task=options.task if options.task in limits.tasks else OTHER_TASK,
        answer_match=checks.enum(
            options, "evaluation.answer_match", AnswerMatch, AnswerMatch.EXACT
        ),
    )


def _reference_answer(options: pb.EvaluationOptions, limits: Limits, checks: Checks) -> str | None:
    if not options.HasField("reference_answer"):
        return None
    path, answer = "evaluation.reference_answer", options.reference_answer
    allowed = Range(1, limits.max_reference_bytes)
    if checks.size(path, len(answer.encode()), allowed, "bytes") and canonicalise(answer) is None:
        checks.refuse(path, repr(answer), "an answer, not blank")
    return answer


def _pass_at_k(
    ks: Sequence[int], num_samples: int, limits: Limits, checks: Checks
) -> tuple[int, ...]:
    path = "evaluation.pass_at_k"
    if not checks.size(path, len(ks), Range(0, limits.max_pass_at_k), "values"):
        return ()
    for index, k in enumerate(ks):
        if not 1 <= k <= num_samples:
            checks.refuse(f"{path}[{index}]", k, f"1 to {num_samples} (num_samples)")
    return tuple(sorted(set(ks)))


def _output(options: pb.OutputOptions, limits: Limits, checks: Checks) -> OutputSpec:
    def flag(name: str, default: bool = True) -> bool:
        return bool(getattr(options, name)) if options.HasField(name) else default

    return OutputSpec(
        stream=flag("stream"),
        logprobs=flag("logprobs"),
        top_logprobs=checks.number(options, "output.top_logprobs", limits.top_logprobs, 0),
        text=flag("text"),
        processed_logprobs=flag("processed_logprobs", default=False),
        prompt_token_ids=flag("return_prompt_token_ids", default=False),
    )


def _completions(
    completions: Sequence[pb.Completion], limits: Limits, checks: Checks
) -> tuple[str | tuple[int, ...], ...]:
    allowed = Range(1, limits.max_completions)
    if not checks.size("completions", len(completions), allowed, "completions"):
        return ()
    return tuple(
        _completion(f"completions[{index}]", completion, limits, checks)
        for index, completion in enumerate(completions)
    )


def _completion(
    path: str, completion: pb.Completion, limits: Limits, checks: Checks
) -> str | tuple[int, ...]:
    match completion.WhichOneof("content"):
        case "text":
            num_bytes = len(completion.text.encode())
            checks.size(f"{path}.text", num_bytes, Range(1, limits.max_prompt_bytes), "bytes")
            return completion.text
        case "token_ids":
            return _token_ids(f"{path}.token_ids.ids", completion.token_ids.ids, limits, checks)
        case _:
            checks.refuse(path, "empty", "token_ids or text")
            return ()


def _roles(roles: Sequence[int], checks: Checks) -> tuple[Role, ...]:
    field = pb.ScoreRequest.DESCRIPTOR.fields_by_name["roles"]
    first = roles[: len(Role) + 1]  # of more, one comes again or is not known
    if len(set(first)) < len(first):
        checks.refuse("roles", list(roles[:4]), "without repetition")
    return tuple(
        checks.enum_value(field, f"roles[{index}]", role, Role, Role.STUDENT)
        for index, role in enumerate(first)
    )
