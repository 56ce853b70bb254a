"""The translation between an engine's requests and another server's messages."""

from __future__ import annotations

import math
from typing import Any

import pytest

from protos.tandem.v1 import inference_pb2 as pb
from serve.engine.scoring import ScoringRequest
from serve.engine.sequence import FinishedEvent, FinishReason, GenerationRequest
from serve.errors import EngineFailedError
from serve.pair.remote_messages import AnswerEvents, from_score, to_generate, to_score
from serve.pair.request import Basis, Limits
from serve.rpc.validation import validate_generate, validate_score
from serve.sampling.params import SamplingParams

LIMITS = Limits(max_model_len=64, vocab_size=100)
SAMPLING = SamplingParams(
    num_samples=3, temperature=0.7, top_p=0.9, top_k=5, min_p=0.01, max_tokens=7, min_tokens=2,
    seed=2**64 - 1, stop_token_ids=frozenset({4, 5}), ignore_eos=True, repetition_penalty=1.1,
)  # fmt: skip


def generation(**changes: Any) -> GenerationRequest:
    return GenerationRequest(
        **{
            "request_id": "r 1",
            "prompt_token_ids": (1, 2),
            "sampling": SAMPLING,
            "logprob_temperature": 0.7,
            "num_top_logprobs": 2,
            "stop": ("a", "b"),
            **changes,
        }
    )


def test_other_server_understands_the_same_request() -> None:
    spec = validate_generate(to_generate(generation()), LIMITS)
    assert spec.sampling == SAMPLING
    assert spec.prompt.token_ids == (1, 2)
    assert spec.stop == ("a", "b")
    assert spec.logprob_temperature == 0.7
    assert spec.divergence.enabled is False
    assert (spec.output.top_logprobs, spec.output.text) == (2, False)
    assert spec.output.logprobs and spec.output.processed_logprobs


@pytest.mark.parametrize(
    ("temperature", "logprob_temperature", "basis"),
    [(0.7, 0.7, Basis.TEMPERED), (0.7, 1.0, Basis.RAW), (0.0, 1.0, Basis.RAW)],
)
def test_log_probabilities_are_at_the_same_temperature(
    temperature: float, logprob_temperature: float, basis: Basis
) -> None:
    sampling = SamplingParams(temperature=temperature)
    request = generation(sampling=sampling, logprob_temperature=logprob_temperature)
    spec = validate_generate(to_generate(request), LIMITS)
    assert (spec.basis, spec.logprob_temperature) == (basis, logprob_temperature)


def test_score_request_survives_the_way() -> None:
    request = ScoringRequest("r", (1, 2), ((3,), (4, 5)), temperature=0.5)
    spec = validate_score(to_score(request), LIMITS)
    assert (spec.prompt.token_ids, spec.completions) == ((1, 2), ((3,), (4, 5)))
    assert (spec.temperature, spec.divergence.enabled) == (0.5, False)


def test_requests_of_one_id_are_several_to_the_other_server() -> None:
    request = generation()
    assert to_generate(request).request_id != to_generate(request).request_id


def test_salt_keeps_tenants_apart_and_does_not_name_them() -> None:
    salts = [to_generate(generation(cache_salt=salt)).cache_salt for salt in ("ada", "ada", "bob")]
    assert salts[0] == salts[1] != salts[2]
    assert "ada" not in salts[0]
    unshared = [to_generate(generation(cache_salt=None)).cache_salt for _ in range(2)]
    assert unshared[0] != unshared[1]


SCORES = pb.ScoreResponse(
    scores=[
        pb.Score(role=pb.ROLE_TEACHER, index=1, token_ids=[4, 5], logprobs=[-2.0, -3.0]),
        pb.Score(role=pb.ROLE_TEACHER, index=0, token_ids=[3], logprobs=[-1.0]),
    ]
)


def test_scores_come_back_in_the_order_of_the_request() -> None:
    scored = from_score(SCORES, ScoringRequest("r", (1,), ((3,), (4, 5))))
    assert [list(completion.logprobs) for completion in scored] == [[-1.0], [-2.0, -3.0]]


def test_server_that_does_not_say_what_is_greedy_may_be_older() -> None:
    scores = pb.ScoreResponse()
    scores.CopyFrom(SCORES)
    scores.scores[0].is_greedy.extend([True, False])
    first, second = from_score(scores, ScoringRequest("r", (1,), ((3,), (4, 5))))
    assert first.is_greedy is None
    assert second.is_greedy is not None and second.is_greedy.tolist() == [True, False]
    scores.scores[0].is_greedy.pop()
    with pytest.raises(EngineFailedError, match="of some tokens only"):
        from_score(scores, ScoringRequest("r", (1,), ((3,), (4, 5))))


@pytest.mark.parametrize("completions", [((3,),), ((3,), (4, 6)), ((3,), (4, 5), (6,))])
def test_scores_of_something_else_are_refused(completions: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(EngineFailedError, match="scored something else"):
        from_score(SCORES, ScoringRequest("r", (1,), completions))


def test_scores_without_a_log_probability_per_token_are_refused() -> None:
    broken = pb.ScoreResponse()
    broken.CopyFrom(SCORES)
    broken.scores[0].logprobs.pop()
    with pytest.raises(EngineFailedError, match="scored something else"):
        from_score(broken, ScoringRequest("r", (1,), ((3,), (4, 5))))


def chunk(index: int, position: int, *token_ids: int) -> pb.GenerateResponse:
    tokens = pb.TokenChunk(
        index=index, position=position, token_ids=token_ids, logprobs=[-1.0] * len(token_ids)
    )
    return pb.GenerateResponse(tokens=tokens)


def complete(index: int, *token_ids: int) -> pb.GenerateResponse:
    sample = pb.Sample(
        index=index,
        token_ids=token_ids,
        logprobs=[-1.0] * len(token_ids),
        processed_logprobs=[-0.5] * len(token_ids),
        finish_reason=pb.FINISH_REASON_STOP,
        timings=pb.Timings(queue_s=1, prefill_s=2, ttft_s=3, decode_s=4),
    )
    return pb.GenerateResponse(complete=pb.Complete(sample=sample))


def usage(cached: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        usage=pb.Usage(roles=[pb.RoleUsage(role=pb.ROLE_TEACHER, cached_prompt_tokens=cached)])
    )


def test_tokens_become_events() -> None:
    answer = AnswerEvents(1)
    assert len(answer.take(chunk(0, 0, 4, 5, 6))) == 3
    first, second = answer.take(chunk(0, 3, 7, 8))
    assert (first.position, first.token_id, first.logprob) == (3, 7, -1.0)
    assert (second.position, second.token_id) == (4, 8)


def test_last_sample_waits_for_the_usage() -> None:
    answer = AnswerEvents(2)
    answer.take(chunk(0, 0, 8))
    answer.take(chunk(1, 0, 7))
    (first,) = answer.take(complete(1, 7))
    assert answer.take(complete(0, 8)) == []
    (second,) = answer.take(usage(cached=16))
    assert isinstance(first, FinishedEvent) and isinstance(second, FinishedEvent)
    assert (first.index, second.index) == (1, 0)
    assert (second.num_cached_prompt_tokens, second.processed_logprobs) == (16, (-0.5,))
    assert second.timings.decode_s == 4
    assert answer.end(FinishReason.ERROR, "too early") == []


def test_end_finishes_what_is_unfinished_once() -> None:
    answer = AnswerEvents(3)
    answer.take(complete(0))
    answer.take(chunk(1, 0, 8))
    ended = answer.end(FinishReason.SHUTDOWN, "lost")
    assert [(e.index, e.finish_reason, e.token_ids, e.error) for e in ended] == [
        (1, FinishReason.SHUTDOWN, (8,), "lost"),
        (2, FinishReason.SHUTDOWN, (), "lost"),
    ]
    assert math.isnan(ended[0].processed_logprobs[0])
    assert answer.end(FinishReason.ERROR, "again") == []


def test_sample_that_waits_for_the_usage_is_whole_without_it() -> None:
    answer = AnswerEvents(1)
    answer.take(complete(0))
    (ended,) = answer.end(FinishReason.ERROR, "too early")
    assert (ended.finish_reason, ended.error) == (FinishReason.STOP, "")


NEW_REASON = pb.GenerateResponse(complete=pb.Complete(sample=pb.Sample(index=0)))
BARE_SAMPLE = pb.GenerateResponse(
    complete=pb.Complete(
        sample=pb.Sample(token_ids=[7], logprobs=[-1.0], finish_reason=pb.FINISH_REASON_STOP)
    )
)
BARE = pb.GenerateResponse(tokens=pb.TokenChunk(index=0, token_ids=[7]))


@pytest.mark.parametrize(
    ("responses", "text"),
    [
        ([chunk(2, 0, 7)], "tokens of sample 2$"),
        ([complete(2)], "the end of sample 2$"),
        ([complete(0), complete(0)], "the end of sample 0$"),
        ([complete(0), chunk(0, 0, 7)], "tokens of sample 0$"),
        ([complete(0), complete(1), complete(1)], "the end of sample 1$"),
        ([chunk(0, 1, 7)], "tokens of sample 0 from 1 on$"),
        ([chunk(0, 0, 7), chunk(0, 0, 7)], "tokens of sample 0 from 0 on$"),
        ([BARE], "tokens of sample 0 without their log-probabilities$"),
        ([chunk(0, 0, 7), BARE_SAMPLE], "sample 0 without its log-probabilities$"),
        ([NEW_REASON], "the reason 0 for the end of sample 0$"),
        ([complete(1), NEW_REASON], "the reason 0 for the end of sample 0$"),
        ([chunk(0, 0, 7), complete(0, 8)], "sample 0 with other tokens than before its end$"),
        ([chunk(0, 0, 7), complete(0)], "sample 0 with other tokens than before its end$"),
    ],
)
def test_nonsense_is_an_error(responses: list[pb.GenerateResponse], text: str) -> None:
    answer = AnswerEvents(2)
    *before, last = responses
    for response in before:
        answer.take(response)
    with pytest.raises(EngineFailedError, match=f"the teacher's server sent {text}"):
        answer.take(last)
    brought: dict[int, tuple[int, ...]] = {}
    for chunk_before in (response.tokens for response in before):
        brought[chunk_before.index] = tuple(chunk_before.token_ids)
    ended = answer.end(FinishReason.ERROR, "nonsense")
    for event in (event for event in ended if event.finish_reason is FinishReason.ERROR):
        assert event.token_ids == brought.get(event.index, ())
    num_ended = sum(response.HasField("complete") for response in before)
    assert len(ended) >= 2 - num_ended
