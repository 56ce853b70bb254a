from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from export.run.errors import ExportError
from export.run.settings import SampleConfig
from export.teacher.sample import (
    ROWS_NAME,
    Completion,
    num_samples_of,
    read_completions,
    sample_teacher,
    task_seed,
    write_completions,
)
from export.teacher.tasks import Task, builtin_tasks
from serve.models.torch_backend import TorchBackend

CONFIG = SampleConfig(max_tokens=12, dtype="float32", max_num_seqs=4, max_model_len=256)
TASKS = builtin_tasks()[:6]
SEVERAL = CONFIG.model_copy(update={"num_samples": 2, "num_verifiable_samples": 3})


def row(task_id: str, *token_ids: int, sample_index: int = 0) -> Completion:
    return Completion(task_id, "train", (1, 2, 3), token_ids, "stop", sample_index)


def keys_of(config: SampleConfig) -> list[tuple[str, int]]:
    """Every row's key, in order."""
    return [(t.task_id, i) for t in TASKS for i in range(num_samples_of(t, config))]


def silent(done: int, total: int) -> None:
    """Show no progress."""


@pytest.fixture(scope="session")
def rows(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Completion]:
    return sample_teacher(tiny_teacher, TASKS, CONFIG, tmp_path_factory.mktemp("rows"), silent)


@pytest.fixture(scope="session")
def several(
    tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Completion], bytes, bytes]:
    """Rows of several samples each, the file before they were put in order, and behind it."""
    folder = tmp_path_factory.mktemp("several")
    appended = b""

    def progress(done: int, total: int) -> None:
        nonlocal appended
        appended = (folder / ROWS_NAME).read_bytes()

    rows = sample_teacher(tiny_teacher, TASKS, SEVERAL, folder, progress)
    return rows, appended, (folder / ROWS_NAME).read_bytes()


# --- what the teacher says


def test_rows_are_one_per_task_in_the_tasks_order(rows: list[Completion]) -> None:
    assert [row.task_id for row in rows] == [task.task_id for task in TASKS]
    assert [row.split for row in rows] == [task.split for task in TASKS]


def test_prompts_are_chats_with_all_their_turns(
    rows: list[Completion], tiny_teacher: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    turns = (("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."))
    chat = Task("chat", "Who are you?", None, "none", "chat", "train", turns=turns)
    sampled = sample_teacher(tiny_teacher, [chat], CONFIG, tmp_path, silent)
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    for completion, task in zip([*rows, *sampled], [*TASKS, chat], strict=True):
        messages = [{"role": role, "content": content} for role, content in task.messages]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert list(completion.prompt_token_ids) == expected
        assert completion.example.prompt_token_ids == completion.prompt_token_ids
        assert completion.example.completion_token_ids == completion.token_ids


def test_completion_ends_with_eos_or_at_max_tokens(rows: list[Completion]) -> None:
    assert {row.finish_reason for row in rows} == {"stop", "length"}
    for completion in rows:
        if completion.finish_reason == "stop":
            assert completion.token_ids.index(2) == len(completion.token_ids) - 1
        else:
            assert len(completion.token_ids) == 12
            assert 2 not in completion.token_ids


def test_answers_follow_from_the_seed_and_the_task_alone(
    rows: list[Completion], tiny_teacher: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    assert sample_teacher(tiny_teacher, TASKS, CONFIG, folders[0], silent) == rows
    assert sample_teacher(tiny_teacher, TASKS[2:3], CONFIG, folders[1], silent) == rows[2:3]
    config = CONFIG.model_copy(update={"seed": 1})
    others = sample_teacher(tiny_teacher, TASKS, config, folders[2], silent)
    assert all(a.token_ids != b.token_ids for a, b in zip(rows, others, strict=True))


def test_task_seed_follows_from_seed_and_task_alone() -> None:
    assert task_seed(0, "a") == task_seed(0, "a")
    seeds = {task_seed(seed, task) for seed in (0, 1) for task in ("a", "b")}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_answer_that_failed_is_an_error_and_no_row(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = TorchBackend.forward

    def nan_behind_the_prompt(self: Any, first_row: int, *args: Any) -> Any:
        logits = forward(self, first_row, *args)
        return logits if args[1] == [0] * len(args[1]) else logits * float("nan")

    monkeypatch.setattr(TorchBackend, "forward", nan_behind_the_prompt)
    with pytest.raises(ExportError, match=r"answer to task \w+ ended with error"):
        sample_teacher(tiny_teacher, TASKS, CONFIG, tmp_path, silent)
    kept = read_completions(tmp_path / ROWS_NAME)
    assert {row.token_ids for row in kept} <= {(2,)}, "what ended with the prompt"


def test_prompt_that_does_not_fit_is_refused_by_task(tiny_teacher: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_model_len": 20})
    with pytest.raises(ExportError, match=rf"task {TASKS[0].task_id}: \d+ .*max_model_len 20"):
        sample_teacher(tiny_teacher, TASKS, config, tmp_path, silent)


def test_teacher_without_chat_template_is_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, teacher)
    (teacher / "chat_template.jinja").unlink()
    with pytest.raises(ExportError, match=rf"asked task {TASKS[0].task_id}: .*no chat template"):
        sample_teacher(teacher, TASKS, CONFIG, tmp_path, silent)


# --- several samples per prompt


def test_samples_of_checkable_and_free_prompts_have_numbers_of_their_own(
    several: tuple[list[Completion], bytes, bytes],
) -> None:
    rows, _, _ = several
    assert [(row.task_id, row.sample_index) for row in rows] == keys_of(SEVERAL)
    assert {task.is_verifiable for task in TASKS} == {True, False}
    for task in TASKS:
        count = sum(row.task_id == task.task_id for row in rows)
        assert count == (3 if task.answer is not None else 2)


def test_samples_of_a_prompt_differ_and_the_first_is_the_only_one_of_a_single_run(
    rows: list[Completion], several: tuple[list[Completion], bytes, bytes]
) -> None:
    of_several, _, _ = several
    assert [row for row in of_several if row.sample_index == 0] == rows
    for task in TASKS:
        texts = [row.token_ids for row in of_several if row.task_id == task.task_id]
        assert len(set(texts)) > 1


def test_prompt_of_several_samples_is_prefilled_once(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = TorchBackend.forward
    prefilled: list[tuple[int, ...]] = []

    def spy(self: Any, first_row: int, token_ids: Any, starts: Any) -> Any:
        pairs = zip(token_ids, starts, strict=True)
        prefilled.extend(tuple(ids) for ids, start in pairs if start == 0)
        return forward(self, first_row, token_ids, starts)

    monkeypatch.setattr(TorchBackend, "forward", spy)
    config = SEVERAL.model_copy(update={"max_num_seqs": 32})
    rows = sample_teacher(tiny_teacher, TASKS, config, tmp_path, silent)
    prompts = {row.prompt_token_ids for row in rows}
    # The backend has read texts of its own, to check itself.
    assert sorted(ids for ids in prefilled if ids in prompts) == sorted(prompts)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999, 1.0])
def test_rerun_of_a_run_killed_at_any_byte_ends_with_the_same_bytes(
    share: float, several: tuple[list[Completion], bytes, bytes], tiny_teacher: Path, tmp_path: Path
) -> None:
    rows, appended, final = several
    assert sorted(appended.splitlines()) == sorted(final.splitlines())
    (tmp_path / ROWS_NAME).write_bytes(appended[: round(share * len(appended))])
    assert sample_teacher(tiny_teacher, TASKS, SEVERAL, tmp_path, silent) == rows
    assert (tmp_path / ROWS_NAME).read_bytes() == final


# --- rows on disk


def test_rerun_draws_what_is_missing_alone_and_leaves_other_tasks_out(
    rows: list[Completion], tiny_teacher: Path, tmp_path: Path
) -> None:
    """Rows that are there stay as they are, though the teacher would say something else."""
    path = tmp_path / ROWS_NAME
    kept = [row(TASKS[1].task_id, 4, 5), row(TASKS[4].task_id, 6)]
    write_completions(path, [kept[0], row("other", 4), kept[1]])
    with path.open("a") as file:
        file.write('{"task_id": "cut short by a ki')
    found = sample_teacher(tiny_teacher, TASKS, CONFIG, tmp_path, silent)
    assert found == [rows[0], kept[0], *rows[2:4], kept[1], rows[5]]
    assert read_completions(path) == found
    assert sample_teacher(tiny_teacher, TASKS, CONFIG, tmp_path, silent) == found


def test_missing_sample_is_drawn_again_and_its_siblings_stay(
    several: tuple[list[Completion], bytes, bytes], tiny_teacher: Path, tmp_path: Path
) -> None:
    kept = [row(task_id, 4, sample_index=i) for task_id, i in keys_of(SEVERAL)]
    kept.pop(1)
    write_completions(tmp_path / ROWS_NAME, kept)
    found = sample_teacher(tiny_teacher, TASKS, SEVERAL, tmp_path, silent)
    assert [found[0], *found[2:]] == kept
    assert found[1] == several[0][1]


def test_row_is_on_disk_when_its_progress_is_shown(tiny_teacher: Path, tmp_path: Path) -> None:
    shown: list[tuple[int, int, int]] = []

    def progress(done: int, total: int) -> None:
        shown.append((done, total, len(read_completions(tmp_path / ROWS_NAME))))

    write_completions(tmp_path / ROWS_NAME, [row(TASKS[0].task_id, 4)])
    sample_teacher(tiny_teacher, TASKS, SEVERAL, tmp_path, progress)
    total = len(keys_of(SEVERAL))
    assert shown == [(done, total, done) for done in range(2, total + 1)]


def test_rows_survive_the_disk(tmp_path: Path) -> None:
    rows = [row("a", 1, 2), row("a", 3, sample_index=1), row("b")]
    write_completions(tmp_path / ROWS_NAME, rows)
    assert read_completions(tmp_path / ROWS_NAME) == rows
    lines = (tmp_path / ROWS_NAME).read_text().splitlines()
    assert json.loads(lines[0]).keys() == {f.name for f in dataclasses.fields(Completion)}
    assert [path.name for path in tmp_path.iterdir()] == [ROWS_NAME]
