"""Whose turn it is: between clients, and between the requests of one."""

from __future__ import annotations

from collections import Counter

import pytest

from serve.engine.sequence import GenerationRequest, Sequence, make_group, make_sequences
from serve.engine.waiting import WaitingLines
from serve.sampling.params import SamplingParams


def samples(client: str, num_samples: int) -> list[Sequence]:
    sampling = SamplingParams(num_samples=num_samples)
    request = GenerationRequest("r", (1,), sampling, client=client)
    return list(make_sequences(make_group(request, lambda events: None, 0.0)))


def served(lines: WaitingLines, num_rows: Counter[str], count: int, max_rows: int = 99) -> str:
    """Return the clients that get the next `count` rows, which stay taken."""
    order = []
    for _ in range(count):
        sequence = lines.next(num_rows, max_rows)
        if sequence is None:
            break
        lines.take(sequence)
        num_rows[sequence.client] += 1
        order.append(sequence.client)
    return "".join(order)


def make(max_turn: int, **num_samples: int) -> WaitingLines:
    lines = WaitingLines(max_turn)
    for client, count in num_samples.items():
        lines.add(samples(client, count))
    return lines


@pytest.mark.parametrize(
    ("num_rows", "expected"),
    [
        ({}, "abcabaaa"),
        ({"a": 3}, "bcbaaaaa"),
        ({"b": 1, "c": 9}, "ababaaac"),
        ({"z": 5}, "abcabaaa"),  # who waits for nothing takes no turn
    ],
)
def test_client_with_the_fewest_rows_is_next(num_rows: dict[str, int], expected: str) -> None:
    lines = make(8, a=5, b=2, c=1)
    assert served(lines, Counter(num_rows), 9) == expected
    assert len(lines) == 0 and not lines.clients


def test_clients_alternate_where_each_row_is_free_again_at_once() -> None:
    lines = make(8, a=4, b=2)
    assert "".join(served(lines, Counter(), 1) for _ in range(6)) == "ababaa"


def test_client_has_no_more_rows_than_it_may() -> None:
    lines = make(8, a=5, b=1)
    assert served(lines, Counter(), 9, max_rows=2) == "aba"
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((2, 2, 1, 2), "aabbcdd"),  # up to a turn's samples: as they came
        ((5, 3), "aabbaaba"),
        ((6, 1, 1, 1, 1, 1, 1), "aabcaadeaafg"),  # not behind all of a long line
        ((6, 6, 1), "aabbaacbbaabb"),  # nor is who came last behind all of two long ones
        ((4, 4, 4), "aabbaaccbbcc"),
    ],
)
def test_request_of_many_samples_lets_others_begin_between_its_turns(
    sizes: tuple[int, ...], expected: str
) -> None:
    lines, names = WaitingLines(2), {}
    for name, size in zip("abcdefg", sizes, strict=False):
        sequences = samples("client", size)
        names[id(sequences[0].group)] = name
        lines.add(sequences)
    order = []
    while sequence := lines.next({}, 99):
        lines.take(sequence)
        order.append(names[id(sequence.group)])
    assert "".join(order) == expected


def test_one_that_is_put_back_is_next_of_its_client_for_this_time_alone() -> None:
    lines = make(2, a=6, b=1)
    first = lines.next({}, 99)
    assert first is not None
    lines.take(first)
    lines.add(samples("a", 1))
    lines.put_back(first)
    assert lines.next({"b": 9}, 99) is first
    lines.take(first)
    following = lines.next({"b": 9}, 99)
    assert following is not None and following.group is not first.group
    assert len(lines) == len(list(lines)) == 7


def test_requests_that_ended_are_removed_and_others_passed_over() -> None:
    lines = make(2, a=3, b=1)
    ended, other = (next(s for s in lines if s.client == client) for client in "ab")
    assert lines.next({}, 99, {id(ended.group)}) is other
    assert [s.index for s in lines.remove({id(ended.group), 1})] == [0, 1, 2]
    assert list(lines) == [other] and lines.clients == {"b"}
    lines.clear()
    assert len(lines) == 0 and lines.next({}, 99) is None
