"""Whose turn it is, for a row and for scoring, and whose deadline is next."""

from __future__ import annotations

from collections import Counter

import pytest

from serve.engine.scoring import ScoringJob, ScoringRequest
from serve.engine.sequence import GenerationRequest, Sequence, make_group, make_sequences
from serve.engine.waiting import Deadlines, ScoringQueue, WaitingLines
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


# Scoring


def scoring_queue(*clients: str) -> ScoringQueue:
    queue = ScoringQueue()
    for number, client in enumerate(clients):
        request = ScoringRequest(f"{client}{number}", (1,), ((2,),), client=client)
        queue.add(ScoringJob(request))
    return queue


def scored(queue: ScoringQueue) -> str:
    order = []
    while (job := queue.first) is not None:
        assert queue.first is job, "the one under way goes on until it is removed"
        queue.remove(job)
        order.append(job.request.request_id)
    assert len(queue) == 0
    return " ".join(order)


def test_clients_alternate_and_each_is_served_in_its_order() -> None:
    assert scored(scoring_queue(*"aaabac")) == "a0 b3 c5 a1 a2 a4"


def test_job_that_is_removed_before_its_turn_costs_its_client_no_turn() -> None:
    queue = scoring_queue(*"abbac")
    (cancelled,) = queue.of("b1")
    queue.remove(cancelled)
    assert [job.request.request_id for job in queue] == ["a0", "a3", "b2", "c4"]
    assert scored(queue) == "a0 b2 c4 a3"


def test_cleared_queue_returns_what_was_in_it() -> None:
    queue = scoring_queue(*"aba")
    assert [job.request.request_id for job in queue.clear()] == ["a0", "a2", "b1"]
    assert queue.first is None and list(queue) == []


# Deadlines


def test_expired_ids_come_earliest_first_and_once() -> None:
    deadlines = Deadlines(set)
    for deadline_s, request_id in ((3.0, "c"), (1.0, "a"), (2.0, "b"), (1.0, "a")):
        deadlines.add(deadline_s, request_id)
    assert list(deadlines.pop_expired(2.0)) == ["a", "a", "b"]
    assert list(deadlines.pop_expired(2.5)) == []
    assert list(deadlines.pop_expired(9.0)) == ["c"]


def test_memory_follows_what_lives() -> None:
    live: set[str] = set()
    deadlines = Deadlines(lambda: live)
    for number in range(10_000):
        live.add(str(number))
        live.discard(str(number - 100))
        deadlines.add(1000.0 + number, str(number))
        assert len(deadlines) <= 512
    assert live <= set(deadlines.pop_expired(1e9))


def test_nothing_that_lives_is_forgotten() -> None:
    deadlines = Deadlines(lambda: {str(number) for number in range(1000)})
    for number in range(1000):
        deadlines.add(float(number), str(number))
    assert len(list(deadlines.pop_expired(1e9))) == 1000
