"""From logits to tokens: every rule against a slow, obvious version."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from serve.engine.sequence import GenerationRequest, Sequence, make_group, make_sequences
from serve.sampling.params import SamplingParams
from serve.sampling.sampler import SampledBatch, Sampler, token_logprobs

EOS = frozenset({2})
# One block of the inverse CDF, several, and several with a rest.
VOCAB_SIZES = (40, 256, 1024, 1000)


def make_sequence(
    *,
    index: int = 0,
    token_ids: SequenceOf[int] = (),
    prompt: tuple[int, ...] = (1,),
    logprob_temperature: float | None = None,
    num_top_logprobs: int = 0,
    forced: tuple[int, ...] = (),
    **settings: Any,
) -> Sequence:
    params = SamplingParams(**settings)
    request = GenerationRequest(
        "r",
        prompt,
        params,
        logprob_temperature=logprob_temperature or params.temperature or 1.0,
        num_top_logprobs=num_top_logprobs,
        forced_completions=(forced,) if forced else (),
    )
    sequence = next(iter(make_sequences(make_group(request, lambda events: None, 0.0))))
    sequence.index = index
    for token_id in token_ids:
        sequence.append(token_id, 0.0, 0.0)
    return sequence


def random_logits(num_rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def sample(logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> SampledBatch:
    return Sampler(EOS).sample(logits, sequences)


def draw_one(logits: torch.Tensor, **settings: Any) -> SampledBatch:
    return sample(logits[None], [make_sequence(**settings)])


def drawn_tokens(logits: torch.Tensor, num_draws: int = 300, **settings: Any) -> set[int]:
    """Return which tokens come out of many seeds."""
    sequences = [make_sequence(seed=seed, **settings) for seed in range(num_draws)]
    return set(sample(logits.expand(num_draws, -1), sequences).token_ids)


# Log-probabilities


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
def test_logprob_is_log_softmax_at_the_temperature(vocab_size: int, temperature: float) -> None:
    logits = random_logits(16, vocab_size)
    sequences = [make_sequence(seed=i, temperature=temperature) for i in range(16)]
    batch = sample(logits, sequences)
    expected = torch.log_softmax(logits.double() / temperature, -1)
    expected = expected.gather(1, torch.tensor(batch.token_ids)[:, None])[:, 0]
    assert batch.logprobs == pytest.approx(expected.tolist(), abs=2e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.5, "logprob_temperature": 1.0},
        {"top_k": 2},
        {"top_p": 0.3},
        {"min_p": 0.5},
        {"repetition_penalty": 3.0, "prompt": tuple(range(40))},
        {"min_tokens": 5},
    ],
)
def test_logprob_is_of_the_distribution_before_any_filter(settings: dict[str, Any]) -> None:
    logits = random_logits(1, 300)[0]
    batch = draw_one(logits, seed=4, **settings)
    expected = torch.log_softmax(logits.double(), -1)[batch.token_ids[0]]
    assert batch.logprobs == pytest.approx([float(expected)], abs=2e-6)


def test_unlikely_token_has_a_finite_logprob_where_its_probability_underflows() -> None:
    logits = torch.zeros(1, 300)
    logits[0, 7] = -500.0
    (logprob,) = token_logprobs(logits, torch.tensor([7]), 1.0).tolist()
    assert logprob == pytest.approx(-500 - math.log(299))


def test_impossible_token_has_logprob_minus_infinity() -> None:
    logits = torch.zeros(1, 300)
    logits[0, 7] = -torch.inf
    assert token_logprobs(logits, torch.tensor([7]), 1.0).tolist() == [-math.inf]


def test_logprob_is_never_positive() -> None:
    logits = random_logits(64, 1000) * torch.logspace(-2, 2, 64)[:, None]
    assert (token_logprobs(logits, logits.argmax(-1), 1.0) <= 0).all()


def test_scoring_gives_the_bits_that_sampling_reported() -> None:
    logits = random_logits(8, 1000)
    sequences = [make_sequence(seed=i, temperature=0.7) for i in range(8)]
    batch = sample(logits, sequences)
    assert token_logprobs(logits, torch.tensor(batch.token_ids), 0.7).tolist() == batch.logprobs


def test_top_logprobs_are_the_likeliest_tokens_on_the_basis() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    (tops,) = draw_one(logits, num_top_logprobs=2, logprob_temperature=0.5).top_logprobs
    expected = torch.log_softmax(logits.double() / 0.5, -1)
    assert [token for token, _ in tops] == [1, 3]
    assert [logprob for _, logprob in tops] == pytest.approx(expected[[1, 3]].tolist())


def test_top_logprobs_hold_the_very_bits_of_the_drawn_tokens() -> None:
    logits = random_logits(4, 1000)
    sequences = [make_sequence(temperature=0.0, num_top_logprobs=i) for i in range(4)]
    batch = sample(logits, sequences)
    assert [len(top) for top in batch.top_logprobs] == [0, 1, 2, 3]
    for row in range(1, 4):
        assert batch.top_logprobs[row][0] == (batch.token_ids[row], batch.logprobs[row])


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_top_logprobs_are_what_a_full_sort_finds(vocab_size: int) -> None:
    logits = random_logits(3, vocab_size)
    batch = sample(logits, [make_sequence(num_top_logprobs=20) for _ in range(3)])
    expected = torch.log_softmax(logits.double(), -1).sort(descending=True)
    for row, top in enumerate(batch.top_logprobs):
        assert [token for token, _ in top] == expected.indices[row, :20].tolist()
        assert [p for _, p in top] == pytest.approx(expected.values[row, :20].tolist(), abs=2e-6)


def test_scoring_many_rows_gives_each_the_bits_that_it_gets_alone() -> None:
    logits, token_ids = random_logits(40, 300), torch.arange(40)
    alone = [token_logprobs(logits[i : i + 1], token_ids[i : i + 1], 0.7) for i in range(40)]
    assert torch.equal(token_logprobs(logits, token_ids, 0.7), torch.cat(alone))


# Processed log-probabilities


def test_processed_logprobs_are_the_logprobs_where_nothing_is_processed() -> None:
    sequences = [make_sequence(seed=i, temperature=0.7) for i in range(4)]
    batch = sample(random_logits(4, 1000), sequences)
    assert batch.processed_logprobs == batch.logprobs


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.5, "logprob_temperature": 1.0},
        {"top_k": 3},
        {"top_p": 0.6, "temperature": 0.8},
        {"min_p": 0.2},
        {"repetition_penalty": 1.5, "prompt": tuple(range(8)), "top_k": 5},
        {"min_tokens": 3},
    ],
)
def test_processed_logprobs_are_of_the_distribution_that_is_drawn_from(
    settings: dict[str, Any],
) -> None:
    """Summed over all tokens that come out, exp(processed) is 1: nothing else is drawn."""
    logits = random_logits(1, 12)[0]
    sequences = [make_sequence(seed=seed, **settings) for seed in range(3000)]
    batch = sample(logits.expand(3000, -1), sequences)
    by_token = dict(zip(batch.token_ids, batch.processed_logprobs, strict=True))
    assert sum(math.exp(p) for p in by_token.values()) == pytest.approx(1.0, abs=2e-3)
    for token, logprob in by_token.items():
        share = batch.token_ids.count(token) / 3000
        assert share == pytest.approx(math.exp(logprob), abs=0.035)


def test_processed_logprob_is_zero_where_greedy_and_says_what_forcing_overruled() -> None:
    logits = random_logits(4, 300)
    logits[2:, 7] = logits[2:, 9] = logits.max() + 1  # of equal ones the lowest id is drawn
    sequences = [
        make_sequence(temperature=0.0),
        make_sequence(seed=1),
        make_sequence(temperature=0.0, forced=(7,)),
        make_sequence(temperature=0.0, forced=(9,)),
    ]
    batch = sample(logits, sequences)
    assert batch.token_ids[2:] == [7, 9]
    assert batch.processed_logprobs[0] == 0.0
    assert batch.processed_logprobs[1] == batch.logprobs[1]
    assert batch.processed_logprobs[2:] == [0.0, -math.inf]
    assert sample(random_logits(1, 300), sequences[:1]).processed_logprobs == [0.0]


# Batches


def mixed_sequences() -> list[Sequence]:
    return [
        make_sequence(seed=1),
        make_sequence(seed=2, temperature=0.0),
        make_sequence(seed=3, temperature=0.6, top_p=0.9),
        make_sequence(seed=4, top_k=7, logprob_temperature=2.0),
        make_sequence(seed=5, min_p=0.1, min_tokens=4),
        make_sequence(seed=6, repetition_penalty=1.3, prompt=(3, 4), token_ids=(5,)),
        make_sequence(forced=(11,)),
        make_sequence(seed=1, index=3, token_ids=(9, 9)),
    ]


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_row_gives_the_same_bits_alone_and_among_others(vocab_size: int) -> None:
    logits, sequences = random_logits(8, vocab_size), mixed_sequences()
    batch = sample(logits, sequences)
    for row, sequence in enumerate(sequences):
        alone = sample(logits[row : row + 1], [sequence])
        assert (alone.token_ids[0], alone.logprobs[0], repr(alone.processed_logprobs[0])) == (
            batch.token_ids[row],
            batch.logprobs[row],
            repr(batch.processed_logprobs[row]),
        )


def test_sampler_kept_over_steps_draws_what_a_new_one_draws() -> None:
    """While sequences grow, leave and come back, and the batch shrinks and grows."""
    sequences, sampler = mixed_sequences(), Sampler(EOS)
    del sequences[6]  # its forced completion is one token long
    for step, chosen in enumerate(([0, 1], range(7), range(7), [6, 2, 5], range(7), [5])):
        rows = [sequences[i] for i in chosen]
        logits = random_logits(len(rows), 1000, seed=step)
        kept, new = sampler.sample(logits, rows), sample(logits, rows)
        assert kept == new
        for sequence, token_id in zip(rows, kept.token_ids, strict=True):
            sequence.append(token_id, 0.0, 0.0)


def test_sampler_follows_a_change_of_the_vocabulary() -> None:
    sampler, sequences = Sampler(EOS), [make_sequence(seed=3)]
    for vocab_size in VOCAB_SIZES:
        logits = random_logits(1, vocab_size)
        assert sampler.sample(logits, sequences) == sample(logits, sequences)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_number_of_threads_changes_no_bit(num_threads: int) -> None:
    logits, sequences = random_logits(8, 40_000), mixed_sequences()
    expected = sample(logits, sequences)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        batch = sample(logits, sequences)
    finally:
        torch.set_num_threads(before)
    assert (batch.token_ids, batch.logprobs) == (expected.token_ids, expected.logprobs)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nonfinite_row_is_flagged_and_disturbs_no_other(vocab_size: int, poison: float) -> None:
    logits, sequences = random_logits(8, vocab_size), mixed_sequences()
    clean = sample(logits, sequences)
    for bad in range(8):
        poisoned = logits.clone()
        poisoned[bad] = poison
        batch = sample(poisoned, sequences)
        assert [row for row in range(8) if not batch.is_finite[row]] == [bad]
        assert 0 <= batch.token_ids[bad] < vocab_size
        for row in set(range(8)) - {bad}:
            assert batch.token_ids[row] == clean.token_ids[row]
            assert batch.logprobs[row] == clean.logprobs[row]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_single_nonfinite_logit_flags_its_row(poison: float) -> None:
    logits = random_logits(1, 1000)[0]
    logits[999] = poison
    assert [draw_one(logits, temperature=t).is_finite for t in (0.0, 1.0)] == [[False], [False]]


def test_logits_are_left_as_they_were() -> None:
    logits = random_logits(8, 300)
    before = logits.clone()
    sample(logits, mixed_sequences())
    assert torch.equal(logits, before)


def test_same_seed_draws_the_same_and_another_seed_another() -> None:
    logits = random_logits(1, 1000)[0]
    draws = [draw_one(logits, seed=seed).token_ids[0] for seed in (1, 1, 2, 3)]
    assert draws[0] == draws[1]
    assert len(set(draws)) > 1


# Greedy, forced, and the filters


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_temperature_zero_takes_the_first_of_the_largest(vocab_size: int) -> None:
    logits = random_logits(6, vocab_size).round()
    sequences = [make_sequence(temperature=0.0) for _ in range(6)]
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert sample(logits, sequences).token_ids == expected


def test_forced_sequence_takes_its_token() -> None:
    logits = random_logits(2, 300)
    sequences = [make_sequence(forced=(7, 8), token_ids=(7,)), make_sequence(temperature=0.0)]
    batch = sample(logits, sequences)
    assert batch.token_ids == [8, int(logits[1].argmax())]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.5}, {0, 1}),  # 0.4 is not enough
        ({"top_p": 0.39}, {0}),
        ({"top_p": 1e-9}, {0}),
        ({"min_p": 0.5}, {0, 1}),  # at least 0.2
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.3}, {0, 1, 2}),
    ],
)
def test_only_kept_tokens_are_drawn_and_all_of_them(
    settings: dict[str, Any], kept: set[int]
) -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert drawn_tokens(logits, **settings) == kept


def test_filters_apply_after_the_temperature() -> None:
    logits = torch.tensor([0.6, 0.4]).log()
    assert drawn_tokens(logits, top_p=0.65) == {0, 1}
    assert drawn_tokens(logits, top_p=0.65, temperature=0.1) == {0}


def test_no_stop_token_before_min_tokens() -> None:
    logits = torch.zeros(6)
    settings = {"min_tokens": 2, "stop_token_ids": frozenset({4})}
    assert drawn_tokens(logits, token_ids=(1,), **settings) == {0, 1, 3, 5}
    assert drawn_tokens(logits, token_ids=(1, 1), **settings) == {0, 1, 2, 3, 4, 5}


# A pass that fails and is tried again


class FailAt(TorchDispatchMode):
    """Has no memory for tensor operation number `count`, from 0 on."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == -1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return func(*args, **(kwargs or {}))


def test_pass_that_fails_at_any_operation_draws_the_same_when_it_is_tried_again() -> None:
    def sequences() -> list[Sequence]:
        rules = {"repetition_penalty": 1.8, "min_tokens": 3}
        return [make_sequence(prompt=(5, 6), seed=seed, **rules) for seed in range(3)]

    def batches(num_until_failure: int) -> tuple[list[SampledBatch], bool]:
        sampler, rows = Sampler(EOS), sequences()
        drawn, is_failed = [], False
        for step in range(3):
            logits = random_logits(3, 40, seed=step)
            try:
                with FailAt(num_until_failure if step == 1 else -1):
                    batch = sampler.sample(logits, rows)
            except torch.OutOfMemoryError:
                is_failed, batch = True, sampler.sample(logits, rows)
            drawn.append(batch)
            for row, sequence in enumerate(rows):
                sequence.append(batch.token_ids[row], 0.0, 0.0)
        return drawn, is_failed

    expected, _ = batches(-1)
    outcomes = [batches(count) for count in range(200)]
    num_failed = sum(is_failed for _, is_failed in outcomes)
    assert 10 < num_failed < 200, "every operation of a pass has failed once"
    assert all(drawn == expected for drawn, _ in outcomes)
