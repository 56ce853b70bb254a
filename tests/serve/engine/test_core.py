"""One engine on a fake model, stepped by hand: what comes out, whatever runs beside it."""

from __future__ import annotations

from typing import Any

import pytest

from serve.engine.prefix_cache import BLOCK_TOKENS
from serve.engine.scoring import ScoringRequest
from serve.engine.sequence import (
    FinishReason,
    GenerationRequest,
    make_group,
    make_sequences,
)
from serve.sampling.params import SamplingParams
from serve.sampling.sampler import Sampler
from tests.support.engines import (
    LONG_PROMPT,
    PROMPT,
    CountingObserver,
    EventReader,
    backend_of,
    is_idle,
    make_engine,
    run,
    submit,
)


def slow_completion(backend: Any, index: int, params: SamplingParams) -> tuple[int, ...]:
    """Decode one sample alone, without cache, rows or engine."""
    group = make_group(GenerationRequest("r", PROMPT, params), lambda events: None, 0.0)
    sequence = list(make_sequences(group))[index]
    eos = frozenset({backend.EOS})
    while True:
        logits = backend.logits_after([*PROMPT, *sequence.token_ids])
        batch = Sampler(eos).sample(logits[None], [sequence])
        sequence.append(batch.token_ids[0], batch.logprobs[0], batch.processed_logprobs[0])
        if sequence.finish_reason(eos):
            return tuple(sequence.token_ids)


# What comes out


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_num_seqs", [1, 3, 8])
def test_completions_are_those_of_decoding_alone(max_num_seqs: int, temperature: float) -> None:
    engine = make_engine(max_num_seqs=max_num_seqs)
    params = SamplingParams(num_samples=6, max_tokens=20, temperature=temperature, seed=3)
    reader = EventReader()
    engine.submit(GenerationRequest("r", PROMPT, params), reader)
    run(engine)
    expected = [slow_completion(backend_of(engine), index, params) for index in range(6)]
    assert reader.completions == expected


def test_same_seed_gives_the_same_tokens_alone_and_among_others() -> None:
    engine = make_engine()
    alone = submit(engine, num_samples=2, seed=9, max_tokens=15)
    run(engine)
    others = [submit(engine, f"o{i}", (i + 10,) * (i + 1), seed=i, max_tokens=i + 2)
             for i in range(9)]  # fmt: skip
    engine.core.step()
    again = submit(engine, num_samples=2, seed=9, max_tokens=15)
    run(engine)
    assert again.completions == alone.completions
    assert all(len(reader.endings) == 1 for reader in others)


def test_prompt_is_prefilled_once_for_all_its_samples() -> None:
    engine = make_engine()
    submit(engine, num_samples=4, max_tokens=2, ignore_eos=True)
    run(engine)
    assert [lengths for _, lengths, _ in backend_of(engine).calls] == [[3], [1, 1, 1, 1]]


def test_completion_may_fill_the_context_to_its_last_token() -> None:
    engine = make_engine(max_model_len=10)
    reader = submit(engine, max_tokens=7, ignore_eos=True, num_samples=2)
    run(engine)
    assert [len(ids) for ids in reader.completions] == [7, 7]


def test_scoring_and_generation_take_turns() -> None:
    observed = CountingObserver()
    engine = make_engine(observer=observed)
    alone = submit(engine, seed=4, max_tokens=12, ignore_eos=True)
    run(engine)
    observed.phases.clear()
    reader = submit(engine, seed=4, max_tokens=12, ignore_eos=True)
    futures = [engine.score(ScoringRequest(f"s{i}", PROMPT, ((1, 2),))) for i in range(4)]
    run(engine)
    assert reader.completions == alone.completions
    assert observed.phases[:5] == ["prefill", "decode", "score", "decode", "score"]
    assert all(future.result(0) for future in futures)


def test_scoring_needs_no_row_of_a_running_sequence() -> None:
    observed = CountingObserver()
    engine = make_engine(max_num_seqs=1, observer=observed)
    submit(engine, max_tokens=9, ignore_eos=True)
    engine.core.step()
    future = engine.score(ScoringRequest("s", PROMPT, ((1, 2),)))
    engine.core.step()
    assert observed.phases == ["prefill", "decode", "score"]
    assert future.done()


# Long prompts and prompts that come again


def test_long_prompt_in_chunks_gives_what_one_pass_gives() -> None:
    whole = make_engine()
    expected = submit(whole, prompt=LONG_PROMPT, num_samples=3, max_tokens=20)
    run(whole)
    engine = make_engine(max_pass_tokens=8)
    others = [submit(engine, f"o{i}", (i + 10,), seed=i, max_tokens=i + 2) for i in range(3)]
    reader = submit(engine, prompt=LONG_PROMPT, num_samples=3, max_tokens=20)
    run(engine)
    assert reader.completions == expected.completions
    calls = backend_of(engine).calls
    assert all(max(lengths) <= 8 for _, lengths, _ in calls)
    assert all(sum(lengths) <= 8 for _, lengths, past in calls if any(past))
    assert all(len(other.endings) == 1 for other in others)


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_cancelled_long_prompt_ends_and_frees_its_row(num_steps: int) -> None:
    engine = make_engine(max_pass_tokens=8)
    reader = submit(engine, prompt=LONG_PROMPT, num_samples=2)
    for _ in range(num_steps):
        engine.core.step()
    engine.cancel("r")
    engine.core.step()
    assert reader.reasons == [FinishReason.CANCELLED] * 2
    assert is_idle(engine)
    again = submit(engine, prompt=LONG_PROMPT)
    run(engine)
    assert len(again.completions) == 1


def test_prompt_that_comes_again_is_copied_and_gives_the_same() -> None:
    observed = CountingObserver()
    engine = make_engine(observer=observed)
    first = submit(engine, seed=5, max_tokens=12)
    run(engine)
    backend_of(engine).calls.clear()
    again = submit(engine, seed=5, max_tokens=12)
    run(engine)
    assert again.completions == first.completions
    assert all(lengths == [1] for _, lengths, _ in backend_of(engine).calls)
    assert again.endings[0].num_cached_prompt_tokens == observed.cached_tokens == len(PROMPT)
    assert first.endings[0].num_cached_prompt_tokens == 0


def test_beginning_that_prompts_share_is_copied() -> None:
    engine = make_engine(max_model_len=400)
    shared = tuple(10 + i % 20 for i in range(2 * BLOCK_TOKENS))
    alone = submit(engine, prompt=(*shared, 7, 8, 9), cache_salt=None, max_tokens=12)
    submit(engine, "other", (*shared, 5, 5), max_tokens=1)
    run(engine)
    backend_of(engine).calls.clear()
    reader = submit(engine, prompt=(*shared, 7, 8, 9), max_tokens=12)
    run(engine)
    assert backend_of(engine).calls[0][1:] == ([3], [2 * BLOCK_TOKENS])
    assert reader.endings[0].num_cached_prompt_tokens == 2 * BLOCK_TOKENS
    assert reader.completions == alone.completions


@pytest.mark.parametrize(
    ("salts", "num_bytes"),
    [(("alice", "bob"), 1 << 20), (("", None), 1 << 20), ((None, ""), 1 << 20), (("", ""), 0)],
)
def test_prompt_is_run_again_for_another_tenant_and_for_those_who_opt_out(
    salts: tuple[str | None, str | None], num_bytes: int
) -> None:
    engine = make_engine(max_prefix_cache_bytes=num_bytes)
    for salt in salts:
        reader = submit(engine, cache_salt=salt, max_tokens=1)
        run(engine)
    assert len(backend_of(engine).calls) == 2
    assert reader.endings[0].num_cached_prompt_tokens == 0


def test_prompt_with_nonfinite_logits_is_not_cached() -> None:
    engine = make_engine()
    backend_of(engine).nan_after = PROMPT[-1]
    assert submit(engine).endings == {}
    run(engine)
    backend_of(engine).nan_after = None
    reader = submit(engine, max_tokens=1)
    run(engine)
    assert reader.reasons == [FinishReason.LENGTH]
