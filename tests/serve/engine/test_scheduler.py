"""Who runs next: admission, rows, and what it costs to import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest

from serve.engine.scheduler import (
    MAX_CALM_STEPS,
    MAX_OVERTAKEN,
    MIN_CALM_STEPS,
    Admission,
    LongPrompt,
    RowMove,
    Scheduler,
)
from serve.engine.sequence import GenerationRequest, Sequence, make_group, make_sequences
from serve.models.backend import NUM_PREFILL_ROWS
from serve.sampling.params import SamplingParams


class Budgeted(Scheduler):
    """Admits batches of one chunk's tokens at most."""

    def admit(self, max_batch_tokens: int | None = None, *args: Any) -> Admission:
        return super().admit(max_batch_tokens or self.max_chunk_tokens, *args)


def make(max_num_seqs: int, max_chunk_tokens: int) -> Budgeted:
    return Budgeted(max_num_seqs, max_chunk_tokens)


def samples(prompt_length: int = 1, num_samples: int = 1, client: str = "") -> list[Sequence]:
    sampling = SamplingParams(num_samples=num_samples)
    request = GenerationRequest("r", (1,) * prompt_length, sampling, client=client)
    return list(make_sequences(make_group(request, lambda events: None, 0.0)))


def waiting(scheduler: Budgeted, *prompt_lengths: int) -> list[Sequence]:
    """Queue one request per prompt length."""
    sequences = [s for length in prompt_lengths for s in samples(length)]
    scheduler.add(sequences)
    return sequences


def test_first_come_is_first_admitted() -> None:
    scheduler = make(2, 100)
    first, second, third = waiting(scheduler, 5, 1, 1)
    assert scheduler.admit().prefills == [first, second]
    scheduler.retire([first])
    assert scheduler.admit().prefills == [third]


def test_no_more_run_than_there_are_rows() -> None:
    scheduler = make(3, 100)
    waiting(scheduler, *[1] * 5)
    scheduler.admit()
    assert (len(scheduler.running), len(scheduler.waiting)) == (3, 2)
    assert scheduler.admit().admitted == []


def test_no_more_are_admitted_until_all_have_ended() -> None:
    scheduler = make(4, 100)
    waiting(scheduler, 1, 1)
    scheduler.admit()
    scheduler.admit_no_more()
    waiting(scheduler, *[1] * 6)
    assert scheduler.admit().admitted == []
    scheduler.retire(scheduler.running[:1])
    assert len(scheduler.admit()) == 1
    scheduler.retire(list(scheduler.running))
    scheduler.admit_no_more()
    assert len(scheduler.admit()) == 4


def decode_until(scheduler: Budgeted, num_running: int) -> int:
    """Count decode steps under load, with memory enough, until so many run."""
    for number in range(100_000):
        if len(scheduler.running) == num_running:
            return number
        scheduler.note_decoded()
        scheduler.admit()
    raise AssertionError(f"{len(scheduler.running)} run for ever")


def test_memory_that_was_short_once_is_tried_again_under_load() -> None:
    scheduler = make(4, 100)
    waiting(scheduler, *[1] * 20)
    scheduler.admit()
    scheduler.retire(scheduler.running[2:])
    scheduler.admit_no_more()
    assert scheduler.admit().admitted == []
    assert decode_until(scheduler, 4) == 2 * MIN_CALM_STEPS


def test_memory_that_stays_short_is_tried_ever_more_rarely() -> None:
    scheduler = make(4, 100)
    waiting(scheduler, *[1] * 40)
    scheduler.admit()
    waits = []
    for _ in range(9):
        scheduler.retire(scheduler.running[3:])
        scheduler.admit_no_more()
        waits.append(decode_until(scheduler, 4))
    assert waits[:3] == [MIN_CALM_STEPS, 2 * MIN_CALM_STEPS, 4 * MIN_CALM_STEPS]
    assert waits[-2:] == [MAX_CALM_STEPS] * 2
    for _ in range(MAX_CALM_STEPS):  # a long calm with all rows, and what was is forgotten
        scheduler.note_decoded()
    scheduler.retire(scheduler.running[3:])
    scheduler.admit_no_more()
    assert decode_until(scheduler, 4) == MIN_CALM_STEPS


def test_steps_of_fewer_than_may_run_say_nothing_of_memory() -> None:
    scheduler = make(4, 100)
    waiting(scheduler, 1, 1)
    scheduler.admit()
    scheduler.admit_no_more()
    scheduler.retire(scheduler.running[1:])
    for _ in range(MIN_CALM_STEPS):
        scheduler.note_decoded()
    waiting(scheduler, 1, 1)
    assert len(scheduler.admit()) == 1


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
    scheduler = make(8, 8)
    waiting(scheduler, *prompt_lengths)
    assert len(scheduler.admit().prefills) == num_admitted


def test_batch_may_be_larger_than_a_chunk() -> None:
    scheduler = make(8, 8)
    waiting(scheduler, 8, 8, 8, 9)
    admission = scheduler.admit(24)
    assert (len(admission.prefills), len(admission.long_prompts)) == (3, 1)


def test_budget_never_lets_a_later_prompt_overtake() -> None:
    scheduler = make(8, 8)
    _, wide, short = waiting(scheduler, 2, 8, 1)
    scheduler.admit()
    assert list(scheduler.waiting) == [wide, short]


def test_samples_of_one_request_prefill_once_and_fork_behind_the_leaders() -> None:
    scheduler = make(8, 100)
    group, other = samples(num_samples=3), samples()
    scheduler.add([*group, *other])
    admission = scheduler.admit()
    assert admission.prefills == [group[0], *other]
    assert admission.forks == [(group[1], group[0]), (group[2], group[0])]
    assert scheduler.running == [group[0], *other, group[1], group[2]]


def test_forks_do_not_count_towards_the_prefill_budget() -> None:
    scheduler = make(8, 10)
    scheduler.add(samples(10, num_samples=6))
    assert len(scheduler.admit().forks) == 5


def test_late_samples_fork_from_one_that_still_runs() -> None:
    scheduler = make(2, 100)
    group = samples(num_samples=3)
    scheduler.add(group)
    scheduler.admit()
    scheduler.retire([group[0]])
    assert scheduler.admit().forks == [(group[2], group[1])]


def test_prompt_is_prefilled_again_when_nobody_holds_it() -> None:
    scheduler = make(1, 100)
    group = samples(num_samples=2)
    scheduler.add(group)
    scheduler.admit()
    scheduler.retire([group[0]])
    assert scheduler.admit().prefills == [group[1]]


def test_last_row_moves_into_the_place_of_a_finished_one() -> None:
    scheduler = make(4, 100)
    a, b, c = waiting(scheduler, 5, 6, 7)
    scheduler.admit()
    c.append(1, 0.0, 0.0)
    c.append(1, 0.0, 0.0)
    assert scheduler.retire([a]) == [RowMove(source=2, target=0, length=8)]
    assert scheduler.running == [c, b]


def test_finished_last_row_moves_nothing() -> None:
    scheduler = make(4, 100)
    a, b = waiting(scheduler, 5, 6)
    scheduler.admit()
    assert scheduler.retire([b]) == []
    assert scheduler.running == [a]


def test_rows_stay_compact_when_several_finish_at_once() -> None:
    scheduler = make(6, 100)
    sequences = waiting(scheduler, *range(1, 7))
    scheduler.admit()
    rows: list[Sequence | None] = list(sequences)
    for move in scheduler.retire([sequences[i] for i in (0, 4, 5, 2)]):
        rows[move.target] = rows[move.source]
    assert set(scheduler.running) == {sequences[1], sequences[3]}
    assert rows[:2] == scheduler.running


def test_ended_groups_leave_the_queue_and_the_others_keep_their_order() -> None:
    scheduler = make(1, 100)
    a, b, c, d = waiting(scheduler, 1, 1, 1, 1)
    assert scheduler.remove_waiting({id(b.group), id(d.group)}) == [b, d]
    assert list(scheduler.waiting) == [a, c]


# Long prompts


def enter(scheduler: Budgeted) -> LongPrompt:
    prompt = scheduler.next_long_prompt()
    assert prompt is not None
    return prompt


def test_long_prompt_enters_a_row_behind_the_running_ones_and_then_runs() -> None:
    scheduler = make(2, 8)
    short, long = waiting(scheduler, 8, 9)
    admission = scheduler.admit()
    assert (admission.prefills, scheduler.running) == ([short], [short])
    [prompt] = admission.long_prompts
    assert prompt == LongPrompt(long, 3) and enter(scheduler) == prompt
    assert scheduler.start(prompt) == 1
    assert scheduler.running == [short, long] and scheduler.next_long_prompt() is None


def test_long_prompts_take_turns() -> None:
    scheduler = make(8, 8)
    a, b, c = waiting(scheduler, 9, 20, 9)
    scheduler.admit()
    assert [enter(scheduler).sequence for _ in range(5)] == [a, b, c, a, b]


def test_client_with_many_long_prompts_leaves_others_a_row_and_every_other_turn() -> None:
    scheduler = make(16, 8)
    waiting(scheduler, *[9] * (NUM_PREFILL_ROWS + 1))
    scheduler.admit()
    enter(scheduler)
    for client in ("other", "third"):
        scheduler.add(samples(9, client=client))
    assert [p.sequence.client for p in scheduler.admit().long_prompts] == ["other"]
    turns = [enter(scheduler).sequence.client for _ in range(7)]
    assert turns == ["", "other"] * 3 + [""]
    assert {s.client for s in scheduler.waiting} == {"", "third"}


def test_long_prompts_count_as_running() -> None:
    scheduler = make(2, 8)
    waiting(scheduler, 9, 9, 1)
    scheduler.admit()
    assert (scheduler.num_active, len(scheduler.waiting)) == (2, 1)
    assert scheduler.admit().admitted == []


def test_short_prompts_overtake_long_ones_that_wait_for_a_row() -> None:
    scheduler = make(16, 8)
    *entering, blocked, short = waiting(scheduler, *[9] * NUM_PREFILL_ROWS, 1)
    admission = scheduler.admit()
    assert [p.sequence for p in admission.long_prompts] == entering
    assert (admission.prefills, list(scheduler.waiting)) == ([short], [blocked])
    scheduler.start(enter(scheduler))
    assert [p.sequence for p in scheduler.admit().long_prompts] == [blocked]


def test_samples_of_a_long_prompt_wait_for_it_and_fork() -> None:
    scheduler = make(8, 8)
    group, other = samples(9, num_samples=3), samples()
    scheduler.add([*group, *other])
    assert scheduler.admit().prefills == other
    assert scheduler.admit().admitted == []
    scheduler.start(enter(scheduler))
    assert scheduler.admit().forks == [(group[1], group[0]), (group[2], group[0])]


def test_cached_prompts_are_restored_whole_and_finished_in_a_row_of_their_own() -> None:
    scheduler = make(8, 8)
    whole, partly, fresh = waiting(scheduler, 20, 7, 6)
    cached = {id(whole.group): 20, id(partly.group): 4, id(fresh.group): 0}
    admission = scheduler.admit(8, lambda group: cached[id(group)])
    assert (admission.restores, admission.prefills) == ([whole], [fresh])
    assert [p.sequence for p in admission.long_prompts] == [partly]
    assert admission.started == scheduler.running == [fresh, whole]


def test_a_long_prompt_that_ends_frees_its_row() -> None:
    scheduler = make(16, 8)
    sequences = waiting(scheduler, *[9] * (NUM_PREFILL_ROWS + 1))
    scheduler.admit()
    assert scheduler.remove_waiting({id(sequences[0].group)}) == sequences[:1]
    [prompt] = scheduler.admit().long_prompts
    assert prompt.sequence is sequences[NUM_PREFILL_ROWS - 1]
    assert scheduler.clear() == [*sequences[1:-1], sequences[-1]]
    assert scheduler.num_active == len(scheduler.waiting) == 0


def test_no_more_than_so_many_are_overtaken() -> None:
    scheduler = make(200, 8)
    waiting(scheduler, *[9] * (NUM_PREFILL_ROWS - 1 + MAX_OVERTAKEN), 1)
    assert scheduler.admit().prefills == []


def test_importing_the_scheduler_loads_no_runtime() -> None:
    code = (
        "import sys, serve.engine.scheduler;"
        "print(sorted({'torch', 'onnxruntime', 'grpc', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
