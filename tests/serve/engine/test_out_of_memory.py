"""Memory that runs out in a pass: tried again with less, then one request's end and no more."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from serve.engine.core import MAX_FAILED_STEPS
from serve.engine.engine import Engine
from serve.engine.prefix_cache import TokenizedPrompt
from serve.engine.rows import MIN_CALM_STEPS
from serve.engine.scheduler import OUT_OF_MEMORY
from serve.engine.scoring import ScoringRequest
from serve.engine.sequence import FinishReason
from serve.errors import EngineFailedError, EngineStoppedError
from tests.support import engines
from tests.support.backends import HistoryBackend, Pass
from tests.support.engines import LONG_PROMPT, EventReader, backend_of, run, submit

PROMPTS = [(5, 6, 7), (8, 9, 10, 11), (12, 13), (14, 15, 16, 17, 18)]
HEAVY = 39
"""A token that a test's backend never has memory for."""

Fits = Callable[[list[int], list[int]], bool]


def allocate_too_much() -> None:
    torch.empty(1 << 48)


class TightBackend(HistoryBackend):
    """`fits(tokens of each row, all the tokens in these rows)` says whether memory is enough."""

    fits: Fits = staticmethod(lambda lengths, tokens: True)

    def before_pass(self, first_row: int, rows: Pass) -> None:
        held = [[*self.rows[first_row + i][:past], *new] for i, (past, new) in enumerate(rows)]
        if not self.fits([len(new) for _, new in rows], [t for row in held for t in row]):
            allocate_too_much()


def make_engine(fits: Fits | None = None, *, max_num_seqs: int = 8, **settings: Any) -> Engine:
    backend = TightBackend(max_num_seqs=max_num_seqs)
    if fits is not None:
        backend.fits = fits
    return engines.make_engine(backend=backend, **settings)


def ask(engine: Engine, prompt: tuple[int, ...], num_samples: int = 2) -> EventReader:
    settings = {"num_samples": num_samples, "seed": 3, "max_tokens": 9, "ignore_eos": True}
    return submit(engine, str(prompt), prompt, **settings)


def answers(engine: Engine, prompts: Sequence[tuple[int, ...]]) -> list[Any]:
    """Return, by prompt, the samples' tokens in order; None for a sample out of memory."""
    readers = [ask(engine, prompt) for prompt in prompts]
    run(engine)
    endings = [[reader.endings[index] for index in sorted(reader.endings)] for reader in readers]
    for event in itertools.chain(*endings):
        assert (event.error == OUT_OF_MEMORY) == (event.finish_reason is FinishReason.ERROR)
    return [[None if e.error else e.token_ids for e in events] for events in endings]


def once(fits: Fits) -> Fits:
    """Return `fits` that is asked until it has said no."""
    is_over = False

    def asked(lengths: list[int], tokens: list[int]) -> bool:
        nonlocal is_over
        if is_over or fits(lengths, tokens):
            return True
        is_over = True
        return False

    return asked


@pytest.mark.parametrize(
    "fits",
    [
        lambda lengths, tokens: max(lengths) == 1 or sum(lengths) <= 3,  # not two prompts at once
        lambda lengths, tokens: max(lengths) == 1 or sum(lengths) <= 16,
        once(lambda lengths, tokens: max(lengths) > 1),  # the first decode step
        once(lambda lengths, tokens: max(lengths) == 1),  # the first prefill
    ],
)
def test_pass_that_is_too_large_is_tried_again_and_nothing_shows(fits: Fits) -> None:
    prompts = [*PROMPTS, LONG_PROMPT]
    expected = answers(make_engine(max_pass_tokens=6), prompts)
    assert answers(make_engine(fits, max_pass_tokens=6), prompts) == expected


def test_every_pass_of_the_second_try_has_a_second_one() -> None:
    """Memory that others take for a moment is missing now and then, not once."""
    passes = itertools.count()
    prompts = [*PROMPTS, LONG_PROMPT]
    expected = answers(make_engine(max_pass_tokens=16), prompts)
    engine = make_engine(lambda lengths, tokens: next(passes) % 2 == 1, max_pass_tokens=16)
    assert answers(engine, prompts) == expected


@pytest.mark.parametrize("heavy", [(HEAVY, 5), (*LONG_PROMPT[:20], HEAVY)])
def test_prompt_that_there_is_no_memory_for_ends_its_request_alone(heavy: tuple[int, ...]) -> None:
    prompts = [*PROMPTS, LONG_PROMPT]
    expected = answers(make_engine(max_pass_tokens=8, max_num_seqs=4), prompts)
    engine = make_engine(
        lambda lengths, tokens: HEAVY not in tokens or max(lengths) == 1,
        max_pass_tokens=8, max_num_seqs=4,
    )  # fmt: skip
    got = answers(engine, [*PROMPTS[:2], heavy, *PROMPTS[2:], LONG_PROMPT])
    assert got == [*expected[:2], [None, None], *expected[2:]]


def test_decode_step_without_memory_ends_the_youngest_and_lets_nobody_in_its_place() -> None:
    expected = answers(make_engine(), PROMPTS)
    engine = make_engine(lambda lengths, tokens: max(lengths) > 1 or len(lengths) <= 4)
    ended = [ask(engine, PROMPTS[0])]
    for prompt in PROMPTS[1:]:
        engine.core.step()
        ended.append(ask(engine, prompt))
    run(engine)
    reasons = [set(reader.reasons) for reader in ended]
    length, error = {FinishReason.LENGTH}, {FinishReason.ERROR}
    assert reasons == [length, length, error, length]
    for place in (0, 1, 3):
        assert sorted(ended[place].completions) == sorted(expected[place])


def test_memory_that_is_short_once_throttles_no_load_that_goes_on() -> None:
    """Steady load never leaves an engine idle."""
    failures: list[int] = []
    engine = make_engine(
        lambda lengths, tokens: max(lengths) > 1 or not (failures and failures.pop()),
        max_num_seqs=4,
    )
    for start in range(3):  # that never end together
        youngest = ask(engine, (start + 4, 5), num_samples=1)
        for _ in range(2):
            engine.core.step()
    failures += [1, 1]  # a decode step, and its second try
    num_running = []
    for number in range(6 * MIN_CALM_STEPS):
        if engine.load().num_waiting < 2:
            ask(engine, (number % 30 + 4, 5), num_samples=1)
        engine.core.step()
        num_running.append(engine.load().num_running)
    assert [event.error for event in youngest.endings.values()] == [OUT_OF_MEMORY]
    assert num_running[1] == 2 and 0 not in num_running
    assert num_running[-1] == 4


@pytest.mark.parametrize("is_sampling", [False, True])
def test_work_that_ran_out_of_memory_is_no_success_between_failures(is_sampling: bool) -> None:
    engine = make_engine()
    for number in range(MAX_FAILED_STEPS):
        run_without_memory(engine, number, is_sampling)
        backend_of(engine).error = RuntimeError("the device is lost")
        ask(engine, (5, 6, number + 10))
        engine.step()
        backend_of(engine).error = None
    with pytest.raises(EngineStoppedError):
        ask(engine, (5, 6))


def run_without_memory(engine: Engine, number: int, is_sampling: bool) -> None:
    """Score something, or decode a token, for which there is no memory."""
    draw = engine.core.runner.sampler.sample
    if is_sampling:
        ask(engine, (5, 6, number + 4), num_samples=1)
        engine.core.step()
        engine.core.runner.sampler.sample = lambda *given: allocate_too_much()  # type: ignore
    else:
        engine.score(ScoringRequest("s", (5, HEAVY), ((1, 2),)))
        backend_of(engine).fits = lambda lengths, tokens: HEAVY not in tokens
    run(engine)
    engine.core.runner.sampler.sample = draw  # type: ignore[method-assign]


@pytest.mark.parametrize("in_one_pass", [True, False])
def test_scoring_is_tried_again_in_smaller_chunks(in_one_pass: bool) -> None:
    completions = ((1, 2, 3, 4, 5, 6), (7,), (8, 9, 10))
    scores = []
    for fits in (None, lambda lengths, tokens: sum(lengths) <= 3):
        engine = make_engine(fits, max_pass_tokens=6, scores_in_one_pass=in_one_pass)
        future = engine.score(ScoringRequest("s", (5, 6, 7), completions))
        run(engine)
        scores.append([one.logprobs.tolist() for one in future.result(0)])
    assert scores[0] == scores[1]


@pytest.mark.parametrize("in_one_pass", [True, False])
@pytest.mark.parametrize(
    ("prompt", "completion"), [((5, HEAVY), (1, 2)), ((5, 6), (1, HEAVY, 2, 2, 2))]
)
def test_scoring_that_there_is_no_memory_for_fails_alone(
    in_one_pass: bool,
    prompt: tuple[int, ...],
    completion: tuple[int, ...],
) -> None:
    engine = make_engine(
        lambda lengths, tokens: HEAVY not in tokens, scores_in_one_pass=in_one_pass
    )
    good = [engine.score(ScoringRequest("a", (5, 6), ((1, 2),)))]
    bad = engine.score(ScoringRequest("s", prompt, (completion,)))
    good.append(engine.score(ScoringRequest("b", (5, 6), ((1, 2),))))
    run(engine)
    with pytest.raises(EngineFailedError, match="ran out of memory"):
        bad.result(0)
    assert all(future.result(0) for future in good)


def test_cached_prompts_make_room() -> None:
    engine = make_engine()
    answers(engine, PROMPTS)
    cache = engine.core.runner.prefix_cache
    assert cache.size_bytes > 0
    backend_of(engine).fits = once(lambda lengths, tokens: False)
    answers(engine, [LONG_PROMPT])
    assert cache.count_cached(TokenizedPrompt.of(PROMPTS[0], "")) == 0


def test_prompt_that_there_is_no_memory_to_cache_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = answers(make_engine(), PROMPTS)
    engine = make_engine()
    monkeypatch.setattr(backend_of(engine), "read_kv", lambda *where: allocate_too_much())
    assert answers(engine, PROMPTS) == expected
    assert engine.core.runner.prefix_cache.size_bytes == 0


@pytest.mark.parametrize("num_failures", [1, 2])
@pytest.mark.parametrize("is_first_token", [True, False])
def test_sampling_out_of_memory_is_tried_again_and_then_ends_what_cannot_wait(
    num_failures: int, is_first_token: bool
) -> None:
    engine = make_engine()
    draw, failures = engine.core.runner.sampler.sample, iter(range(num_failures))

    def sample(logits: torch.Tensor, sequences: Any) -> Any:
        if bool(sequences[0].token_ids) != is_first_token and next(failures, None) is not None:
            allocate_too_much()
        return draw(logits, sequences)

    engine.core.runner.sampler.sample = sample  # type: ignore[method-assign]
    expected = answers(make_engine(), PROMPTS)
    got = answers(engine, PROMPTS)
    num_lost = sum(samples == [None, None] for samples in got)
    assert num_lost == (0 if num_failures == 1 else len(PROMPTS) if is_first_token else 1)
    assert all(a == b for a, b in zip(got, expected, strict=True) if a != [None, None])
