from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from estimators.answers import extract
from estimators.bootstrap import bootstrap_mean
from export.measure.task_scores import TaskEvaluation, TaskResult, choose_tasks, evaluate_tasks
from export.run.errors import ExportError
from export.run.settings import EvaluateConfig
from export.teacher.grading import Grade
from export.teacher.sample import task_seed
from export.teacher.tasks import GymEntry, Task, builtin_tasks
from serve.models.torch_backend import TorchBackend
from serve.text.tokenizer import Tokenizer
from tests.support.backends import FakeBackend

EOS = 2
CONFIG = EvaluateConfig(num_samples=4, k=(2, 4), task_max_tokens=6, temperature=1.0, max_num_seqs=4)


def task(name: str, answer: str, family: str = "add") -> Task:
    return Task(name, f"What is {name}?", answer, "last_number", family, "test")


TASKS = [task("1+3", "4"), task("2+3", "5"), task("2*3", "6", "multiply"), task("2+2", "4")]


def digit_backend(tokenizer: Tokenizer, digits: str) -> FakeBackend:
    """Answers any prompt with one of `digits`, all equally likely, and ends."""
    answers = [tokenizer.encode(digit)[0] for digit in digits]
    logits = torch.full((tokenizer.num_tokens, tokenizer.num_tokens), -1e4)
    logits[:, answers] = 0.0
    logits[answers] = -1e4
    logits[answers, EOS] = 0.0
    return FakeBackend(logits, max_model_len=256, max_num_seqs=4)


@pytest.fixture(scope="session")
def tokenizer(tiny_teacher: Path) -> Tokenizer:
    return Tokenizer.load(tiny_teacher)


def silent(done: int, total: int) -> None:
    """Show no progress."""


def run(
    tokenizer: Tokenizer, backends: dict[str, Any], tasks: Sequence[Task] = TASKS, **changes: Any
) -> TaskEvaluation:
    config = CONFIG.model_copy(update=changes)
    return evaluate_tasks(tasks, backends, tokenizer, frozenset({EOS}), config, silent)


@pytest.fixture(scope="session")
def evaluation(tokenizer: Tokenizer) -> TaskEvaluation:
    """The teacher knows two of the three answers, the student one of them."""
    return run(
        tokenizer,
        {"teacher": digit_backend(tokenizer, "45"), "student": digit_backend(tokenizer, "4")},
    )


def load_tiny(folder: Path, max_num_seqs: int = 4) -> TorchBackend:
    return TorchBackend.load(
        folder, device="cpu", dtype=torch.float32, max_num_seqs=max_num_seqs, max_model_len=128
    )


def texts(evaluation: TaskEvaluation) -> dict[tuple[str, str, int], str]:
    return {(c.model, c.task_id, c.sample_index): c.text for c in evaluation.completions}


# --- completions


def test_models_answer_every_task_n_times_in_order(evaluation: TaskEvaluation) -> None:
    assert [(c.model, c.task_id, c.sample_index) for c in evaluation.completions] == [
        (model, task.task_id, index)
        for model in ("teacher", "student")
        for task in TASKS
        for index in range(4)
    ]


def test_completion_is_judged_by_its_answer(evaluation: TaskEvaluation) -> None:
    answers = {task.task_id: task.answer for task in TASKS}
    assert {c.text for c in evaluation.completions} == {"4", "5"}
    for completion in evaluation.completions:
        assert completion.answer == completion.text
        assert completion.is_correct == (completion.text == answers[completion.task_id])
        assert (completion.finish_reason, completion.num_tokens) == ("stop", 2)


def test_samples_do_not_depend_on_the_batch(tiny_teacher: Path, tokenizer: Tokenizer) -> None:
    """The same with one row or five, alone or among others."""
    together = texts(run(tokenizer, {"a": load_tiny(tiny_teacher, 5)}))
    one_by_one = texts(run(tokenizer, {"a": load_tiny(tiny_teacher, 1)}))
    alone = texts(run(tokenizer, {"a": load_tiny(tiny_teacher)}, TASKS[2:3]))
    assert one_by_one == together
    assert alone.items() <= together.items()
    assert len(set(together.values())) > len(TASKS)


def test_samples_follow_from_the_seed_of_the_recipe_and_the_task(tokenizer: Tokenizer) -> None:
    """Two tasks of one prompt differ in their seeds alone, and so in their samples."""
    twins = [dataclasses.replace(TASKS[0], task_id=name) for name in ("a", "b")]
    assert task_seed(CONFIG.seed, "a") != task_seed(CONFIG.seed, "b")
    backends = {"m": digit_backend(tokenizer, "45")}
    found, other = (run(tokenizer, backends, twins, num_samples=16, seed=seed) for seed in (0, 1))
    first, second = ([c.text for c in found.completions if c.task_id == name] for name in "ab")
    assert first != second
    assert texts(found) != texts(other)


def test_answers_of_a_model_without_numbers_are_wrong_and_counted(
    tiny_teacher: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = TorchBackend.forward

    def nan_behind_the_prompt(self: Any, first_row: int, *args: Any) -> Any:
        logits = forward(self, first_row, *args)
        return logits if args[1] == [0] * len(args[1]) else logits * float("nan")

    monkeypatch.setattr(TorchBackend, "forward", nan_behind_the_prompt)
    right = Grade(True, "4")
    monkeypatch.setattr("export.measure.task_scores.grade", lambda task, text, **options: right)
    found = run(tokenizer, {"a": load_tiny(tiny_teacher)})
    failed = [c for c in found.completions if c.finish_reason == "error"]
    assert failed
    assert not any(c.is_correct for c in failed)
    assert found.summary().models["a"].num_failed == len(failed)


def test_task_progress_counts_completions_of_all_models(tokenizer: Tokenizer) -> None:
    shown: list[tuple[int, int]] = []
    backends = {name: digit_backend(tokenizer, "4") for name in "ab"}
    evaluate_tasks(TASKS, backends, tokenizer, frozenset({EOS}), CONFIG, lambda *p: shown.append(p))
    assert shown == [(done, 32) for done in range(1, 33)]


def test_whole_text_votes_where_the_scorer_reads_it_whole(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = GymEntry("graph_color", 10, 0, "{}", 3)
    free = [dataclasses.replace(TASKS[0], answer_format="none", gym_entry=entry)]
    monkeypatch.setattr("export.teacher.grading.is_entry_solved", lambda task, text: text == "4")
    found = run(tokenizer, {"a": digit_backend(tokenizer, "4")}, free)
    assert found.results["a"][0].majority == 1.0


def test_equivalent_answers_are_right_and_math_verify_said_so(tokenizer: Tokenizer) -> None:
    root = [dataclasses.replace(TASKS[0], answer="\\sqrt{16}")]
    found = run(
        tokenizer, {"a": digit_backend(tokenizer, "4"), "b": digit_backend(tokenizer, "5")}, root
    )
    assert [found.results[model][0].num_correct for model in "ab"] == [4, 0]
    assert [found.results[model][0].majority for model in "ab"] == [1.0, 0.0]
    opinion = found.second_opinion
    assert (opinion.num_asked, opinion.num_right, opinion.num_undecided) == (8, 4, 0)


# --- scores


def result(num_correct: int, majority: float, family: str = "add") -> TaskResult:
    return TaskResult(f"t{num_correct}", family, 8, num_correct, majority)


def test_pass_at_k_is_the_mean_over_prompts_with_its_interval() -> None:
    """Of 8 samples 1 and 3 right: pass@4 is .5 and .92857."""
    config = EvaluateConfig(num_samples=8, k=(4,))
    results = (result(1, 0.0), result(3, 1.0), result(0, 0.0, "multiply"))
    scores = TaskEvaluation(config, {"m": results}, ()).pass_rates("m")
    assert list(scores.pass_at_k) == [1, 4]
    assert scores.pass_at_k[1] == bootstrap_mean([0.125, 0.375, 0.0])
    assert scores.pass_at_k[4].value == pytest.approx((0.5 + 0.9285714286) / 3)
    assert scores.majority_at_n == bootstrap_mean([0.0, 1.0, 0.0])


def test_family_has_its_own_scores() -> None:
    results = (result(1, 0.0), result(3, 1.0), result(8, 1.0, "multiply"))
    evaluation = TaskEvaluation(EvaluateConfig(), {"m": results}, ())
    assert evaluation.pass_rates("m", "add").num_prompts == 2
    assert evaluation.pass_rates("m", "add").pass_at_k[1].value == 0.25
    one = evaluation.pass_rates("m", "multiply").pass_at_k[1]
    assert (one.value, one.interval) == (1.0, None)


def test_majority_counts_the_votes(evaluation: TaskEvaluation) -> None:
    """Counted again from the texts: a right majority 1, a tie ½, none 0."""
    for model, results in evaluation.results.items():
        for task, found in zip(TASKS, results, strict=True):
            said = [
                c.text
                for c in evaluation.completions
                if (c.model, c.task_id) == (model, task.task_id)
            ]
            num_right = said.count(task.answer or "")
            assert found.num_correct == num_right
            most = max(said.count("4"), said.count("5"))
            num_leading = sum(said.count(digit) == most for digit in "45")
            assert found.majority == (1 / num_leading if num_right == most else 0)


def test_student_that_always_says_four_solves_half(evaluation: TaskEvaluation) -> None:
    scores = evaluation.pass_rates("student")
    assert [e.value for e in scores.pass_at_k.values()] == [0.5, 0.5, 0.5]
    assert scores.majority_at_n.value == 0.5
    assert evaluation.pass_rates("teacher").pass_at_k[4].value > 0.5


def test_majority_of_abstentions_is_not_right(tokenizer: Tokenizer) -> None:
    assert extract("x", "last_number") is None
    found = run(tokenizer, {"a": digit_backend(tokenizer, "x")})
    assert [r.majority for r in found.results["a"]] == [0.0] * 4


# --- what is written


def test_summary_is_by_model_and_family(evaluation: TaskEvaluation) -> None:
    summary = evaluation.summary()
    assert (summary.num_samples, summary.max_tokens, summary.temperature) == (4, 6, 1.0)
    student = summary.models["student"]
    assert student.overall.pass_at_k[4].value == 0.5
    assert student.overall.pass_at_k[4].interval is not None
    assert student.families.keys() == {"add", "multiply"}
    assert student.families["multiply"].num_prompts == 1
    assert student.num_failed == 0


def test_task_rows_hold_what_every_model_made_of_a_task(evaluation: TaskEvaluation) -> None:
    rows = evaluation.rows()
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert [row["task_id"] for row in rows] == [task.task_id for task in TASKS]
    assert [row["num_correct"]["student"] for row in rows] == [4, 0, 0, 4]
    assert [row["majority"]["student"] for row in rows] == [1, 0, 0, 1]
    assert {(row["kind"], row["num_samples"]) for row in rows} == {("task", 4)}


# --- which tasks


def test_chosen_tasks_are_the_first_verifiable_test_tasks() -> None:
    tasks = builtin_tasks()
    chosen = choose_tasks(tasks, 5)
    assert len(chosen) == 5
    assert all(t.split == "test" and t.answer is not None for t in chosen)
    assert chosen == choose_tasks(tasks, 10_000)[:5]
    assert choose_tasks(tasks, 0) == []


def test_task_without_an_answer_is_refused(tokenizer: Tokenizer) -> None:
    free = dataclasses.replace(TASKS[0], answer=None, answer_format="none")
    with pytest.raises(ExportError, match="has no answer to check"):
        run(tokenizer, {"a": digit_backend(tokenizer, "4")}, [free])


def test_prompt_that_does_not_fit_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ExportError, match=r"task_max_tokens 250 exceed the 256 positions of 'a'"):
        run(tokenizer, {"a": digit_backend(tokenizer, "4")}, task_max_tokens=250)
