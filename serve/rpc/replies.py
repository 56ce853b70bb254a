"""Results into messages: field by field, without a decision of its own."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping

from estimators.consensus import Vote
from protos.tandem.v1 import inference_pb2 as pb
from serve.engine.scoring import ScoringRequest
from serve.pair.answers.judge import Judgement
from serve.pair.arm import ArmResult, SampleChunk, SampleResult, TopLogprobs
from serve.pair.divergence import CompletionScore, SampleDivergence
from serve.pair.remote_teacher import RemoteTeacher
from serve.pair.request import Basis, DivergenceSpec, GenerationSpec, ScoreSpec
from serve.pair.served import Role, ServedModel

# Looked up once: a stream names its role with every token.
_ROLES = {Role.STUDENT: pb.ROLE_STUDENT, Role.TEACHER: pb.ROLE_TEACHER}


def to_role(role: Role) -> str:
    """Return the name of our role in messages."""
    return _name("ROLE", role)


def to_chunk(chunk: SampleChunk, spec: GenerationSpec) -> pb.GenerateResponse:
    """Return an event of new tokens: one per token, so that it is filled in, not put together."""
    response, output = pb.GenerateResponse(), spec.output
    tokens = response.tokens
    tokens.role = _ROLES[chunk.role]
    tokens.index = chunk.index
    tokens.position = chunk.position
    tokens.token_ids.extend(chunk.token_ids)
    if output.text:
        tokens.text = chunk.text
    if output.logprobs:
        tokens.logprobs.extend(chunk.logprobs)
    if chunk.top_logprobs:
        tokens.top_logprobs.extend(_top_logprobs(chunk.top_logprobs))
    return response


def to_sample(sample: SampleResult, spec: GenerationSpec) -> pb.Sample:
    timings = sample.timings
    message = pb.Sample(
        role=to_role(sample.role),
        index=sample.index,
        text=sample.text if spec.output.text else "",
        token_ids=sample.token_ids,
        text_ends=sample.text_ends if spec.output.text else (),
        logprobs=sample.logprobs if spec.output.logprobs else (),
        processed_logprobs=sample.processed_logprobs if spec.output.processed_logprobs else (),
        finish_reason=_name("FINISH_REASON", sample.finish_reason),
        answer=sample.answer,
        divergence=_sample_divergence(sample, spec),
        timings=pb.Timings(
            queue_s=timings.queue_s,
            prefill_s=timings.prefill_s,
            ttft_s=timings.ttft_s,
            decode_s=timings.decode_s,
        ),
        error=sample.error,
        divergence_error=sample.divergence_error,
        top_logprobs=_top_logprobs(sample.top_logprobs),
    )
    if sample.correct is not None:
        message.correct = sample.correct
    return message


def _sample_divergence(sample: SampleResult, spec: GenerationSpec) -> pb.Divergence | None:
    if sample.divergence is None:
        return None
    message = to_divergence(
        sample.divergence, spec.basis, spec.divergence, with_logprobs=spec.output.logprobs
    )
    message.truncated = spec.sampling.is_truncated
    return message


def to_divergence(
    divergence: SampleDivergence, basis: Basis, options: DivergenceSpec, *, with_logprobs: bool
) -> pb.Divergence:
    summary, exact = divergence.summary, divergence.exact
    return pb.Divergence(
        policy=to_role(divergence.policy),
        reference=to_role(divergence.reference),
        basis=_name("BASIS", basis),
        num_tokens=summary.num_tokens,
        k1_sum=summary.k1_sum,
        k2_sum=summary.k2_sum,
        k3_sum=summary.k3_sum,
        k1_mean=summary.k1_mean,
        k2_mean=summary.k2_mean,
        k3_mean=summary.k3_mean,
        exact_mean=exact.kl_mean if exact else None,
        argmax_agreement=exact.argmax_agreement if exact else None,
        predicted_acceptance=exact.predicted_acceptance if exact else None,
        per_token_k3=divergence.per_token_k3 if options.per_token else (),
        reference_logprobs=divergence.reference_logprobs if with_logprobs else (),
        max_abs_log_ratio=summary.max_abs_log_ratio,
        nonfinite_tokens=summary.nonfinite_tokens,
        large_ratio_tokens=summary.large_ratio_tokens,
    )


def to_agreement(agreement: Judgement) -> pb.Agreement:
    kind = agreement.reference_kind
    message = pb.Agreement(
        student=_vote(agreement.votes.get(Role.STUDENT)),
        teacher=_vote(agreement.votes.get(Role.TEACHER)),
        student_pass_at_k=agreement.pass_at_k.get(Role.STUDENT, {}),
        teacher_pass_at_k=agreement.pass_at_k.get(Role.TEACHER, {}),
        reference_kind=_name("REFERENCE_KIND", kind) if kind else None,
    )
    if agreement.same_answer is not None:
        message.same_answer = agreement.same_answer
    return message


def to_usage(spec: GenerationSpec, arms: Iterable[ArmResult], seconds: float) -> pb.Usage:
    return pb.Usage(
        request_id=spec.request_id,
        seed=spec.sampling.seed,
        roles=[
            pb.RoleUsage(
                role=to_role(arm.role),
                prompt_tokens=len(arm.prompt_token_ids),
                cached_prompt_tokens=arm.num_cached_prompt_tokens,
                completion_tokens=sum(len(sample.token_ids) for sample in arm.samples),
                prompt_token_ids=arm.prompt_token_ids if spec.output.prompt_token_ids else (),
            )
            for arm in arms
        ],
        seconds=seconds,
    )


def to_score(score: CompletionScore, spec: ScoreSpec) -> pb.Score:
    basis = spec.divergence.basis
    divergence = None
    if score.divergence is not None:
        divergence = to_divergence(score.divergence, basis, spec.divergence, with_logprobs=True)
    return pb.Score(
        role=to_role(score.role),
        index=score.index,
        token_ids=score.token_ids,
        logprobs=score.logprobs,
        sum_logprob=score.logprobs.sum(),
        divergence=divergence,
        is_greedy=() if score.is_greedy is None else score.is_greedy,
    )


def to_score_usage(
    spec: ScoreSpec, requests: Mapping[Role, ScoringRequest], seconds: float
) -> pb.Usage:
    return pb.Usage(
        request_id=spec.request_id,
        roles=[
            pb.RoleUsage(
                role=to_role(role),
                prompt_tokens=len(request.prompt_token_ids),
                completion_tokens=sum(map(len, request.completions)),
                prompt_token_ids=request.prompt_token_ids if spec.returns_prompt_token_ids else (),
            )
            for role, request in requests.items()
        ],
        seconds=seconds,
    )


def to_model(model: ServedModel) -> pb.Model:
    """Describe a model; of a remote one pass on what its server says."""
    if isinstance(model.engine, RemoteTeacher):
        return model.engine.model
    info, noise = model.engine.info, model.noise
    return pb.Model(
        role=to_role(model.role),
        backend=info.backend,
        device=info.device,
        precision=info.precision,
        num_parameters=info.num_parameters,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        tokenizer_hash=model.tokenizer.hash,
        bundle_id=model.bundle_id,
        manifest_sha256=model.manifest_sha256,
        path_noise_nats=noise.path_nats if noise else None,
        batch_noise_nats=noise.batch_nats if noise else None,
        backend_noise_nats=model.backend_noise_nats,
        batch_invariant=info.batch_invariant,
    )


def _vote(vote: Vote | None) -> pb.Vote | None:
    if vote is None:
        return None
    return pb.Vote(
        answer=vote.answer,
        share=vote.share,
        num_valid=vote.num_valid,
        num_samples=vote.num_samples,
        tie=vote.tie,
    )


def _top_logprobs(tops: Iterable[TopLogprobs]) -> list[pb.TopLogprobs]:
    return [
        pb.TopLogprobs(
            entries=[pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in top]
        )
        for top in tops
    ]


def _name(prefix: str, member: enum.Enum) -> str:
    """Return the name in messages of our enum's member: the same behind the enum's prefix."""
    return f"{prefix}_{member.name}"
