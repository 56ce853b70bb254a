"""When a sequence ends, and what its last event says."""

from __future__ import annotations

from typing import Any

import pytest

from serve.engine.sequence import (
    FinishReason,
    GenerationRequest,
    Sequence,
    Timings,
    make_group,
    make_sequences,
)
from serve.sampling.params import SamplingParams
from serve.text.stop_strings import StopCheck

EOS = frozenset({2})


def make_sequence(**settings: Any) -> Sequence:
    fields = {"forced_completions", "make_stop_check"} & settings.keys()
    request = {name: settings.pop(name) for name in fields}
    sampling = SamplingParams(**settings)
    group = make_group(
        GenerationRequest("r", (7, 8), sampling, **request), lambda events: None, 1.0
    )
    return next(iter(make_sequences(group)))


def reason_after(sequence: Sequence, *token_ids: int) -> FinishReason | None:
    """Return the reason after the last of the tokens; there is none before."""
    for token_id in token_ids[:-1]:
        sequence.append(token_id, 0.0, 0.0)
        assert sequence.finish_reason(EOS) is None
    sequence.append(token_ids[-1], 0.0, 0.0)
    return sequence.finish_reason(EOS)


@pytest.mark.parametrize(
    ("settings", "token_ids", "reason"),
    [
        ({}, (5,), None),
        ({}, (5, 2), FinishReason.STOP),
        ({"ignore_eos": True}, (5, 2), None),
        ({"stop_token_ids": frozenset({9})}, (5, 9), FinishReason.STOP),
        ({"stop_token_ids": frozenset({9}), "ignore_eos": True}, (2, 9), FinishReason.STOP),
        ({"max_tokens": 3}, (5, 5, 5), FinishReason.LENGTH),
        ({"max_tokens": 2}, (5, 2), FinishReason.STOP),
        ({"min_tokens": 3}, (5, 2), None),
        ({"min_tokens": 2}, (5, 2), FinishReason.STOP),
        ({"min_tokens": 3, "max_tokens": 3}, (2, 2, 5), FinishReason.LENGTH),
        ({"forced_completions": ((2, 2, 5),), "max_tokens": 1}, (2, 2, 5), FinishReason.LENGTH),
    ],
)
def test_finish_reason(
    settings: dict[str, Any], token_ids: tuple[int, ...], reason: FinishReason | None
) -> None:
    assert reason_after(make_sequence(**settings), *token_ids) is reason


def test_stop_check_sees_the_whole_completion_and_ends_it() -> None:
    sequence = make_sequence(make_stop_check=lambda: lambda ids: ids == [4, 5])
    assert reason_after(sequence, 4, 5) is FinishReason.STOP


def test_each_sample_has_a_stop_check_of_its_own() -> None:
    made: list[StopCheck] = []

    def make() -> StopCheck:
        made.append(lambda ids: False)
        return made[-1]

    request = GenerationRequest("r", (1,), SamplingParams(num_samples=3), make_stop_check=make)
    sequences = list(make_sequences(make_group(request, lambda events: None, 0.0)))
    assert [s.stop_check for s in sequences] == made


def test_newest_token_is_not_cached_yet() -> None:
    sequence = make_sequence()
    assert sequence.num_cached_tokens == 2
    sequence.append(5, 0.0, 0.0)
    assert sequence.num_cached_tokens == 2
    sequence.append(5, 0.0, 0.0)
    assert sequence.num_cached_tokens == 3


def test_timings_of_a_sequence_that_never_started_are_its_wait() -> None:
    event = make_sequence().finished_event(FinishReason.DEADLINE, 4.0)
    assert event.timings == Timings(queue_s=3.0)


def test_timings_add_up() -> None:
    sequence = make_sequence()
    sequence.started_s, sequence.prefilled_s, sequence.first_token_s = 2.0, 2.5, 3.0
    sequence.append(5, -0.5, -0.5)
    event = sequence.finished_event(FinishReason.STOP, 7.0)
    assert event.timings == Timings(queue_s=1.0, prefill_s=0.5, ttft_s=2.0, decode_s=4.0)
    assert (event.token_ids, event.logprobs, event.error) == ((5,), (-0.5,), "")


@pytest.mark.parametrize(
    ("settings", "is_truncated"),
    [
        ({}, False),
        ({"temperature": 0.7, "seed": 5, "ignore_eos": True}, False),
        ({"temperature": 0.0}, True),
        ({"top_k": 5}, True),
        ({"top_p": 0.9}, True),
        ({"min_p": 0.1}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"min_tokens": 1}, True),
    ],
)
def test_truncated_means_drawn_from_another_distribution(
    settings: dict[str, Any], is_truncated: bool
) -> None:
    assert SamplingParams(**settings).is_truncated is is_truncated


@pytest.mark.parametrize(
    "request_fields",
    [
        {"prompt_token_ids": ()},
        {"forced_completions": ((1,), (2,))},
        {"forced_completions": ((),)},
        {"logprob_temperature": 0.0},
    ],
)
def test_impossible_request_is_our_own_fault(request_fields: dict[str, Any]) -> None:
    fields = {"request_id": "r", "prompt_token_ids": (1,), "sampling": SamplingParams()}
    with pytest.raises(AssertionError):
        GenerationRequest(**{**fields, **request_fields})
