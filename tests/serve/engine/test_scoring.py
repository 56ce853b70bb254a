"""Teacher-forced log-probabilities: in one pass, in chunks, and by forced decoding."""

from __future__ import annotations

from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
import torch

from serve.engine.engine import Engine
from serve.engine.offline import OfflineEngine
from serve.engine.prefix_cache import PrefixCache, TokenizedPrompt
from serve.engine.runner import Prefiller
from serve.engine.scoring import (
    ForcedScores,
    ScoredCompletion,
    ScoringJob,
    ScoringRequest,
    forced_request,
    scoring_error,
)
from serve.engine.sequence import FinishedEvent, FinishReason, Timings
from serve.errors import EngineFailedError, EngineStoppedError

PROMPT = (5, 6, 7)
COMPLETIONS = ((1, 2, 3, 4), (9,), (8, 8, 8), (3, 2))


def make_request(**fields: Any) -> ScoringRequest:
    return ScoringRequest("r", PROMPT, **{"completions": COMPLETIONS, **fields})


def slow_logprobs(backend: Any, completion: tuple[int, ...], temperature: float) -> list[float]:
    logprobs = []
    for position, token_id in enumerate(completion):
        logits = backend.logits_after([*PROMPT, *completion[:position]])
        logprobs.append(float(torch.log_softmax(logits.double() / temperature, -1)[token_id]))
    return logprobs


def run_job(
    backend: Any,
    request: ScoringRequest,
    *,
    first_row: int = 0,
    num_rows: int = 4,
    max_tokens: int = 1000,
) -> list[ScoredCompletion]:
    """Score to the end; every pass must take cache rows and tokens within its bounds."""
    prefiller = Prefiller(backend, PrefixCache(backend, 0))
    job = ScoringJob(request)
    while not job.is_done:
        backend.calls.clear()
        job.advance(prefiller, first_row, num_rows, max_tokens)
        for row, lengths, _ in backend.calls:
            assert first_row <= row and row + len(lengths) <= first_row + num_rows
            assert max(lengths) * len(lengths) <= max_tokens
    return job.scored


@pytest.mark.parametrize("num_rows", [1, 3, 8])
@pytest.mark.parametrize("max_tokens", [4, 9, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_scores_are_log_softmax_at_the_temperature(
    make_backend: Any, temperature: float, max_tokens: int, num_rows: int
) -> None:
    backend = make_backend()
    if num_rows > max_tokens:
        num_rows = max_tokens
    bounds = {"num_rows": num_rows, "max_tokens": max_tokens}
    scored = run_job(backend, make_request(temperature=temperature), first_row=2, **bounds)
    for one, completion in zip(scored, COMPLETIONS, strict=True):
        expected = slow_logprobs(backend, completion, temperature)
        assert one.logprobs.tolist() == pytest.approx(expected, abs=1e-6)
        assert one.logprobs.dtype == np.float64 and one.logits is None


class TieBackend:
    """Makes the logits of two tokens the largest, and equal."""

    def __init__(self, backend: Any, lower: int, higher: int) -> None:
        self._backend = backend
        self._tied = [lower, higher]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def forward(self, *arguments: Any) -> torch.Tensor:
        logits: torch.Tensor = self._backend.forward(*arguments)
        logits[:, self._tied] = 100.0
        return logits


@pytest.mark.parametrize("in_one_pass", [True, False])
def test_token_is_greedy_where_temperature_0_takes_it(make_backend: Any, in_one_pass: bool) -> None:
    """At another temperature too, which changes no order."""
    likeliest, ids = [], list(PROMPT)
    for _ in range(4):
        likeliest.append(int(make_backend().logits_after(ids).argmax()))
        ids.append(likeliest[-1])
    completions = (tuple(likeliest), (*likeliest[:2], (likeliest[2] + 1) % 40))
    engine = make_engine(make_backend(), in_one_pass=in_one_pass)
    scored = scores_of(engine, make_request(completions=completions, temperature=2.0))
    found = [one.is_greedy.tolist() for one in scored]
    assert found == [[True, True, True, True], [True, True, False]]


@pytest.mark.parametrize("in_one_pass", [True, False])
def test_of_equally_likely_tokens_the_lowest_id_is_greedy(
    make_backend: Any, in_one_pass: bool
) -> None:
    engine = make_engine(TieBackend(make_backend(), 4, 11), in_one_pass=in_one_pass)
    scored = scores_of(engine, make_request(completions=((4, 11, 4),)))
    assert scored[0].is_greedy.tolist() == [True, False, True]


@pytest.mark.parametrize("max_tokens", [4, 1000])
def test_logits_of_every_completion_position_come_when_asked_for(
    make_backend: Any, max_tokens: int
) -> None:
    backend = make_backend()
    scored = run_job(backend, make_request(with_logits=True), max_tokens=max_tokens)
    for one, completion in zip(scored, COMPLETIONS, strict=True):
        assert one.logits is not None
        assert one.logits.shape == (len(completion), backend.VOCAB_SIZE)
        for position, logits in enumerate(one.logits):
            expected = backend.logits_after([*PROMPT, *completion[:position]])
            assert np.array_equal(logits, expected.numpy())


def test_prompt_runs_once_and_the_last_token_of_a_completion_never(make_backend: Any) -> None:
    backend = make_backend()
    job = ScoringJob(make_request())
    prefiller = Prefiller(backend, PrefixCache(backend, 0))
    while not job.is_done:
        job.advance(prefiller, 0, 4, 1000)
    assert backend.calls == [(0, [3], [0]), (0, [3, 2, 1], [3, 3, 3])]


def test_prompt_that_was_generated_from_is_not_run_again(make_backend: Any) -> None:
    backend = make_backend()
    prefix_cache = PrefixCache(backend, 1 << 20)
    prefiller = Prefiller(backend, prefix_cache)
    prefiller.run_batch(0, [TokenizedPrompt.of(PROMPT, "")])
    backend.calls.clear()
    job = ScoringJob(make_request())
    job.advance(prefiller, 2, 2, 1000)
    assert backend.calls == [(2, [3, 2], [3, 3])]


def make_engine(backend: Any, *, in_one_pass: bool) -> Engine:
    eos = frozenset({backend.EOS})
    return Engine(backend, eos_token_ids=eos, scores_in_one_pass=in_one_pass)


def scores_of(engine: Engine, request: ScoringRequest) -> list[Any]:
    future = engine.score(request)
    while not future.done():
        engine.core.step()
    return future.result()


def test_forced_decoding_gives_the_bits_of_one_pass(make_backend: Any) -> None:
    request = make_request(temperature=0.7, with_logits=True)
    one_pass, forced = (
        scores_of(make_engine(make_backend(max_num_seqs=2), in_one_pass=is_one), request)
        for is_one in (True, False)
    )
    for mine, other in zip(one_pass, forced, strict=True):
        assert np.array_equal(mine.logprobs, other.logprobs)
        assert np.array_equal(mine.logits, other.logits)


@pytest.mark.parametrize("in_one_pass", [True, False])
def test_nonfinite_logits_are_scored_as_nan(make_backend: Any, in_one_pass: bool) -> None:
    backend = make_backend()
    backend.nan_after = 2
    scored = scores_of(make_engine(backend, in_one_pass=in_one_pass), make_request())
    assert np.isnan(scored[0].logprobs).tolist() == [False, False, True, False]
    assert all(np.isfinite(one.logprobs).all() for one in scored[1:])


@pytest.mark.parametrize("in_one_pass", [True, False])
def test_scoring_past_its_deadline_fails_with_timeout_and_runs_nothing(
    make_backend: Any, in_one_pass: bool
) -> None:
    backend = make_backend()
    engine = make_engine(backend, in_one_pass=in_one_pass)
    future = engine.score(make_request(deadline_s=engine.clock() - 1))
    engine.core.step()
    with pytest.raises(TimeoutError, match="deadline"):
        future.result(0)
    assert backend.calls == [] and engine.load().num_waiting == 0


@pytest.mark.parametrize("in_one_pass", [True, False])
def test_cancelled_scoring_fails_with_cancelled(make_backend: Any, in_one_pass: bool) -> None:
    engine = make_engine(make_backend(), in_one_pass=in_one_pass)
    future = engine.score(make_request())
    engine.cancel("r")
    engine.core.step()
    with pytest.raises(CancelledError):
        future.result(0)
    assert engine.load().num_waiting == 0


@pytest.mark.parametrize("in_one_pass", [True, False])
def test_future_that_somebody_else_cancels_fails_nobody(
    make_backend: Any, in_one_pass: bool
) -> None:
    engine = make_engine(make_backend(), in_one_pass=in_one_pass)
    assert engine.score(make_request()).cancel() is False
    assert len(scores_of(engine, make_request())) == 4
    assert engine.load().num_waiting == 0


@pytest.mark.parametrize("in_one_pass", [True, False])
def test_stopped_engine_fails_its_scoring(make_backend: Any, in_one_pass: bool) -> None:
    engine = make_engine(make_backend(), in_one_pass=in_one_pass)
    future = engine.score(make_request())
    engine.stop()
    with pytest.raises(EngineStoppedError):
        future.result(0)
    with pytest.raises(EngineStoppedError):
        engine.score(make_request())


def test_two_scorings_may_share_a_request_id(make_backend: Any) -> None:
    """A Compare scores the student's samples and, sample by sample, its own: under one id."""
    engine = make_engine(make_backend(), in_one_pass=False)
    futures = [engine.score(make_request()), engine.score(make_request(completions=((4, 4),)))]
    while not all(future.done() for future in futures):
        engine.core.step()
    assert [len(future.result()) for future in futures] == [4, 1]


def test_forced_request_takes_every_completion_as_a_sample() -> None:
    request = forced_request(make_request(temperature=0.7))
    assert request.forced_completions == COMPLETIONS
    assert (request.sampling.num_samples, request.logprob_temperature) == (4, 0.7)


def test_first_failure_of_a_forced_scoring_is_its_failure() -> None:
    scores = ForcedScores(2)
    failed = [FinishedEvent(i, FinishReason.ERROR, (), (), Timings(), f"no {i}") for i in (0, 1)]
    scores.sink(list(failed))
    with pytest.raises(EngineFailedError, match="no 0"):
        scores.future.result(0)


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (FinishReason.DEADLINE, TimeoutError),
        (FinishReason.CANCELLED, CancelledError),
        (FinishReason.SHUTDOWN, EngineStoppedError),
        (FinishReason.ERROR, EngineFailedError),
    ],
)
def test_scoring_error_by_reason(reason: FinishReason, kind: type[Exception]) -> None:
    assert type(scoring_error(reason, "")) is kind


@pytest.mark.parametrize("in_one_pass", [True, False])
def test_token_that_the_model_does_not_have_fails_the_one_who_asks(
    make_backend: Any, in_one_pass: bool
) -> None:
    backend = make_backend()
    engine = make_engine(backend, in_one_pass=in_one_pass)
    future = engine.score(make_request())
    size = backend.info.vocab_size
    with pytest.raises(EngineFailedError, match=f"no token {size}: its vocabulary has {size}"):
        engine.score(make_request(completions=((1, size - 1), (2, size, 3))))
    for _ in OfflineEngine(engine).run():
        pass
    assert len(future.result()) == len(COMPLETIONS)
    assert engine.load().num_unaccounted == engine.load().num_waiting == 0


@pytest.mark.parametrize("fields", [{"completions": ((1,), ())}, {"prompt_token_ids": ()}])
def test_nothing_to_score_is_our_own_fault(fields: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="nothing to score"):
        ScoringRequest(**{"request_id": "r", "prompt_token_ids": (1,), "completions": (), **fields})
