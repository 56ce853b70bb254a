"""Who runs next: admission, rows, and what it costs to import."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest

from serve.engine.rows import (
    MAX_CALM_STEPS,
    MAX_OVERTAKEN,
    MIN_CALM_STEPS,
    RowLimits,
    Rows,
)
from serve.engine.sequence import (
    GenerationRequest,
    LongPrompt,
    Prefill,
    RowMove,
    Sequence,
    make_group,
    make_sequences,
)
from serve.models.backend import NUM_PREFILL_ROWS
from serve.sampling.params import SamplingParams


class Admitted:
    """An admission as lists, each of `forks` beside the sequence that it copies from."""

    def __init__(self, rows: Rows, work: Prefill | None) -> None:
        work = work or Prefill(0, (), (), (), (), (), (), 0.0)
        self.prefills, self.restores = list(work.prefills), list(work.restores)
        self.forks = [(sequence, rows.running[row]) for sequence, row in work.forks]
        self.long_prompts = list(work.long_prompts)
        self.all = [*work.started, *work.resumed, *(p.sequence for p in work.long_prompts)]


class Admitting(Rows):
    def let_in(self) -> Admitted:
        return Admitted(self, self.admit(0.0))


def make(
    max_num_seqs: int, max_chunk_tokens: int, lone_pass_tokens: int | None = None, **settings: Any
) -> Admitting:
    lone_pass_tokens = lone_pass_tokens or max_chunk_tokens
    return Admitting(RowLimits(max_num_seqs, max_chunk_tokens, lone_pass_tokens), **settings)


def samples(prompt_length: int = 1, num_samples: int = 1, client: str = "") -> list[Sequence]:
    sampling = SamplingParams(num_samples=num_samples)
    request = GenerationRequest("r", (1,) * prompt_length, sampling, client=client)
    return list(make_sequences(make_group(request, lambda events: None, 0.0)))


def waiting(rows: Admitting, *prompt_lengths: int) -> list[Sequence]:
    """Queue one request per prompt length."""
    sequences = [s for length in prompt_lengths for s in samples(length)]
    rows.waiting.add(sequences)
    return sequences


def test_first_come_is_first_admitted() -> None:
    rows = make(2, 100)
    first, second, third = waiting(rows, 5, 1, 1)
    assert rows.let_in().prefills == [first, second]
    rows.retire([first])
    assert rows.let_in().prefills == [third]


def test_no_more_run_than_there_are_rows() -> None:
    rows = make(3, 100)
    waiting(rows, *[1] * 5)
    rows.let_in()
    assert (len(rows.running), len(rows.waiting)) == (3, 2)
    assert rows.let_in().all == []


def test_no_more_are_admitted_until_all_have_ended() -> None:
    rows = make(4, 100)
    waiting(rows, 1, 1)
    rows.let_in()
    rows.admit_no_more()
    waiting(rows, *[1] * 6)
    assert rows.let_in().all == []
    rows.retire(rows.running[:1])
    assert len(rows.let_in().all) == 1
    rows.retire(list(rows.running))
    rows.admit_no_more()
    assert len(rows.let_in().all) == 4


def decode_until(rows: Admitting, num_running: int) -> int:
    """Count decode steps under load, with memory enough, until so many run."""
    for number in range(100_000):
        if len(rows.running) == num_running:
            return number
        rows.note_decoded()
        rows.let_in()
    raise AssertionError(f"{len(rows.running)} run for ever")


def test_memory_that_was_short_once_is_tried_again_under_load() -> None:
    rows = make(4, 100)
    waiting(rows, *[1] * 20)
    rows.let_in()
    rows.retire(rows.running[2:])
    rows.admit_no_more()
    assert rows.let_in().all == []
    assert decode_until(rows, 4) == 2 * MIN_CALM_STEPS


def test_memory_that_stays_short_is_tried_ever_more_rarely() -> None:
    rows = make(4, 100)
    waiting(rows, *[1] * 40)
    rows.let_in()
    waits = []
    for _ in range(9):
        rows.retire(rows.running[3:])
        rows.admit_no_more()
        waits.append(decode_until(rows, 4))
    assert waits[:3] == [MIN_CALM_STEPS, 2 * MIN_CALM_STEPS, 4 * MIN_CALM_STEPS]
    assert waits[-2:] == [MAX_CALM_STEPS] * 2
    for _ in range(MAX_CALM_STEPS):  # a long calm with all rows, and what was is forgotten
        rows.note_decoded()
    rows.retire(rows.running[3:])
    rows.admit_no_more()
    assert decode_until(rows, 4) == MIN_CALM_STEPS


def test_steps_of_fewer_than_may_run_say_nothing_of_memory() -> None:
    rows = make(4, 100)
    waiting(rows, 1, 1)
    rows.let_in()
    rows.admit_no_more()
    rows.retire(rows.running[1:])
    for _ in range(MIN_CALM_STEPS):
        rows.note_decoded()
    waiting(rows, 1, 1)
    assert len(rows.let_in().all) == 1


@pytest.mark.parametrize(
    ("prompt_lengths", "num_admitted"),
    [
        ((4, 4), 2),  # 2 * 4 = 8
        ((2, 4, 1), 2),  # a third row would pad all to 3 * 4
        ((2, 2, 2, 8), 3),  # the last one would pad all to 4 * 8
    ],
)
def test_padded_prefill_stays_within_its_budget(
    prompt_lengths: SequenceOf[int], num_admitted: int
) -> None:
    rows = make(8, 8)
    waiting(rows, *prompt_lengths)
    assert len(rows.let_in().prefills) == num_admitted


def test_batch_may_be_larger_than_a_chunk() -> None:
    rows = make(8, 8, lone_pass_tokens=24)
    waiting(rows, 8, 8, 8, 9)
    admission = rows.let_in()
    assert (len(admission.prefills), len(admission.long_prompts)) == (3, 1)


def test_budget_never_lets_a_later_prompt_overtake() -> None:
    rows = make(8, 8)
    _, wide, short = waiting(rows, 2, 8, 1)
    rows.let_in()
    assert list(rows.waiting) == [wide, short]


def test_samples_of_one_request_prefill_once_and_fork_behind_the_leaders() -> None:
    rows = make(8, 100)
    group, other = samples(num_samples=3), samples()
    rows.waiting.add([*group, *other])
    admission = rows.let_in()
    assert admission.prefills == [group[0], *other]
    assert admission.forks == [(group[1], group[0]), (group[2], group[0])]
    assert rows.running == [group[0], *other, group[1], group[2]]


def test_forks_do_not_count_towards_the_prefill_budget() -> None:
    rows = make(8, 10)
    rows.waiting.add(samples(10, num_samples=6))
    assert len(rows.let_in().forks) == 5


def test_late_samples_fork_from_one_that_still_runs() -> None:
    rows = make(2, 100)
    group = samples(num_samples=3)
    rows.waiting.add(group)
    rows.let_in()
    rows.retire([group[0]])
    assert rows.let_in().forks == [(group[2], group[1])]


def test_prompt_is_prefilled_again_when_nobody_holds_it() -> None:
    rows = make(1, 100)
    group = samples(num_samples=2)
    rows.waiting.add(group)
    rows.let_in()
    rows.retire([group[0]])
    assert rows.let_in().prefills == [group[1]]


def test_last_row_moves_into_the_place_of_a_finished_one() -> None:
    rows = make(4, 100)
    a, b, c = waiting(rows, 5, 6, 7)
    rows.let_in()
    c.append(1, 0.0, 0.0)
    c.append(1, 0.0, 0.0)
    assert rows.retire([a]) == [RowMove(source=2, target=0, length=8)]
    assert rows.running == [c, b]


def test_finished_last_row_moves_nothing() -> None:
    rows = make(4, 100)
    a, b = waiting(rows, 5, 6)
    rows.let_in()
    assert rows.retire([b]) == []
    assert rows.running == [a]


def test_rows_stay_compact_when_several_finish_at_once() -> None:
    rows = make(6, 100)
    sequences = waiting(rows, *range(1, 7))
    rows.let_in()
    held: list[Sequence | None] = list(sequences)
    for move in rows.retire([sequences[i] for i in (0, 4, 5, 2)]):
        held[move.target] = held[move.source]
    assert set(rows.running) == {sequences[1], sequences[3]}
    assert held[:2] == rows.running


def test_ended_groups_leave_the_queue_and_the_others_keep_their_order() -> None:
    rows = make(1, 100)
    a, b, c, d = waiting(rows, 1, 1, 1, 1)
    assert rows.remove_waiting({id(b.group), id(d.group)}) == [b, d]
    assert list(rows.waiting) == [a, c]


# Long prompts


def enter(rows: Admitting) -> LongPrompt:
    prompt = rows.next_long_prompt()
    assert prompt is not None
    return prompt


def test_long_prompt_enters_a_row_behind_the_running_ones_and_then_runs() -> None:
    rows = make(2, 8)
    short, long = waiting(rows, 8, 9)
    admission = rows.let_in()
    assert (admission.prefills, rows.running) == ([short], [short])
    [prompt] = admission.long_prompts
    assert prompt == LongPrompt(long, 3) and enter(rows) == prompt
    assert rows.start(prompt) == 1
    assert rows.running == [short, long] and rows.next_long_prompt() is None


def test_long_prompts_take_turns() -> None:
    rows = make(8, 8)
    a, b, c = waiting(rows, 9, 20, 9)
    rows.let_in()
    assert [enter(rows).sequence for _ in range(5)] == [a, b, c, a, b]


def test_client_with_many_long_prompts_leaves_others_a_row_and_every_other_turn() -> None:
    rows = make(16, 8)
    waiting(rows, *[9] * (NUM_PREFILL_ROWS + 1))
    rows.let_in()
    enter(rows)
    for client in ("other", "third"):
        rows.waiting.add(samples(9, client=client))
    assert [p.sequence.client for p in rows.let_in().long_prompts] == ["other"]
    turns = [enter(rows).sequence.client for _ in range(7)]
    assert turns == ["", "other"] * 3 + [""]
    assert {s.client for s in rows.waiting} == {"", "third"}


def test_long_prompts_count_as_running() -> None:
    rows = make(2, 8)
    waiting(rows, 9, 9, 1)
    rows.let_in()
    assert (rows.num_active, len(rows.waiting)) == (2, 1)
    assert rows.let_in().all == []


def test_short_prompts_overtake_long_ones_that_wait_for_a_row() -> None:
    rows = make(16, 8)
    *entering, blocked, short = waiting(rows, *[9] * NUM_PREFILL_ROWS, 1)
    admission = rows.let_in()
    assert [p.sequence for p in admission.long_prompts] == entering
    assert (admission.prefills, list(rows.waiting)) == ([short], [blocked])
    rows.start(enter(rows))
    assert [p.sequence for p in rows.let_in().long_prompts] == [blocked]


def test_samples_of_a_long_prompt_wait_for_it_and_fork() -> None:
    rows = make(8, 8)
    group, other = samples(9, num_samples=3), samples()
    rows.waiting.add([*group, *other])
    assert rows.let_in().prefills == other
    assert rows.let_in().all == []
    rows.start(enter(rows))
    assert rows.let_in().forks == [(group[1], group[0]), (group[2], group[0])]


def test_cached_prompts_are_restored_whole_and_finished_in_a_row_of_their_own() -> None:
    cached = {20: 20, 7: 4, 6: 0}
    rows = make(8, 8, count_cached=lambda group: cached[len(group.prompt.token_ids)])
    whole, partly, fresh = waiting(rows, 20, 7, 6)
    admission = rows.let_in()
    assert (admission.restores, admission.prefills) == ([whole], [fresh])
    assert [p.sequence for p in admission.long_prompts] == [partly]
    assert rows.running == [fresh, whole]


def test_a_long_prompt_that_ends_frees_its_row() -> None:
    rows = make(16, 8)
    sequences = waiting(rows, *[9] * (NUM_PREFILL_ROWS + 1))
    rows.let_in()
    assert rows.remove_waiting({id(sequences[0].group)}) == sequences[:1]
    [prompt] = rows.let_in().long_prompts
    assert prompt.sequence is sequences[NUM_PREFILL_ROWS - 1]
    assert rows.clear() == [*sequences[1:-1], sequences[-1]]
    assert rows.num_active == len(rows.waiting) == 0


def test_no_more_than_so_many_are_overtaken() -> None:
    rows = make(200, 8)
    waiting(rows, *[9] * (NUM_PREFILL_ROWS - 1 + MAX_OVERTAKEN), 1)
    assert rows.let_in().prefills == []
