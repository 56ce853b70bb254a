from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from export.teacher.examples import Example, collate


def test_collate_counts_eos_and_every_token_that_looks_like_padding() -> None:
    eos = pad = 0
    batch = [Example((5, pad, 6), (7, pad, eos)), Example((5,), (6, 7, 8, pad, 9, eos))]
    input_ids, positions, labels = collate(batch)
    assert input_ids.tolist() == [[5, 0, 6, 7, 0, 0], [5, 6, 7, 8, 0, 9]]
    assert positions.tolist() == [2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert labels.tolist() == [7, pad, eos, 6, 7, 8, pad, 9, eos]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5))
def test_collate_predicts_every_completion_token_from_the_token_before_it(
    lengths: list[tuple[int, int]],
) -> None:
    ids = itertools.count(1)
    batch = [
        Example(tuple(itertools.islice(ids, p)), tuple(itertools.islice(ids, c)))
        for p, c in lengths
    ]
    input_ids, positions, labels = collate(batch)
    assert (input_ids.flatten()[positions] + 1).tolist() == labels.tolist()
    assert labels.tolist() == [token for e in batch for token in e.completion_token_ids]
