"""Penalties and minimum lengths against one row and one token at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.sequence import GenerationRequest, Sequence, make_group, make_sequences
from serve.sampling.params import SamplingParams
from serve.sampling.penalties import LogitRules


def make_sequence(prompt: tuple[int, ...], **settings: Any) -> Sequence:
    request = GenerationRequest("r", prompt, SamplingParams(**settings))
    (sequence,) = make_sequences(make_group(request, lambda events: None, 0.0))
    return sequence


def make_rules(*sequences: Sequence) -> LogitRules:
    return LogitRules(sequences, frozenset({2}), torch.device("cpu"))


VALUES = st.lists(st.floats(-5, 5, width=32), min_size=8, max_size=8)
ROW = st.tuples(VALUES, st.sets(st.integers(0, 7)), st.sampled_from([0.5, 1.0, 1.5]))


@given(st.lists(ROW, min_size=1, max_size=3))
def test_penalty_shrinks_the_logits_of_what_was_said(
    rows: list[tuple[list[float], set[int], float]],
) -> None:
    """At two steps of the same rules: the second knows the token drawn in between."""
    sequences = [
        make_sequence((0, *sorted(said)), repetition_penalty=penalty) for _, said, penalty in rows
    ]
    rules = make_rules(*sequences)
    for token in (7, 5):
        for sequence in sequences:
            sequence.append(token, 0.0, 0.0)
        processed = torch.tensor([values for values, _, _ in rows])
        rules.apply(processed)
        for (values, said, penalty), after in zip(rows, processed.tolist(), strict=True):
            seen = {0, *said, *sequences[0].token_ids}
            for i, before in enumerate(values):
                factor = 1.0 if i not in seen else 1 / penalty if before > 0 else penalty
                assert after[i] == pytest.approx(before * factor, abs=1e-6)


def test_no_stop_token_before_min_tokens() -> None:
    short = make_sequence((1,), min_tokens=1, stop_token_ids=frozenset({4}))
    rules = make_rules(make_sequence((1,)), short)
    logits = torch.zeros(2, 6)
    assert rules.are_due()
    rules.apply(logits)
    assert logits.tolist() == [[0.0] * 6, [0.0, 0.0, -torch.inf, 0.0, -torch.inf, 0.0]]
    short.append(3, 0.0, 0.0)
    assert not rules.are_due()


def test_rules_are_due_only_where_there_are_any() -> None:
    assert not make_rules(make_sequence((1,))).are_due()
    assert make_rules(make_sequence((1,)), make_sequence((1,), repetition_penalty=2.0)).are_due()
