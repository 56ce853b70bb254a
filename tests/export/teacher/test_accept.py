from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from export.run.errors import ExportError
from export.run.settings import AcceptConfig
from export.teacher.accept import (
    REASONS,
    AcceptedCompletions,
    accept,
    foreign_share,
    read_accepted,
    repeated_share,
    write_accepted,
)
from export.teacher.sample import ROWS_NAME, Completion, read_completions
from export.teacher.tasks import Split, Task
from serve.text.tokenizer import Tokenizer

EOS = 2
LOOSE = AcceptConfig(max_per_prompt=100)


@pytest.fixture(scope="session")
def tokenizer(tiny_teacher: Path) -> Tokenizer:
    return Tokenizer.load(tiny_teacher)


def checked(task_id: str = "sum", split: Split = "train") -> Task:
    return Task(task_id, "What is 2 + 2?", "4", "last_number", "add", split)


def free(task_id: str = "free", prompt: str = "Say something.", split: Split = "train") -> Task:
    return Task(task_id, prompt, None, "none", "chat", split)


def answers(tokenizer: Tokenizer, task: Task, *texts: str) -> list[Completion]:
    """One finished completion per text, in order of the sample indices."""
    return [
        Completion(task.task_id, task.split, (1, 5), (*tokenizer.encode(text), EOS), "stop", index)
        for index, text in enumerate(texts)
    ]


def judge(
    tokenizer: Tokenizer, task: Task, *texts: str, config: AcceptConfig = LOOSE, **settings: Any
) -> tuple[list[int], dict[str, int]]:
    """Return the accepted sample indices, and how often each reason was given.

    Another task has an answer that is accepted: nothing accepted is an error.
    """
    config = config.model_copy(update=settings)
    other = free("other")
    rows = answers(tokenizer, task, *texts) + answers(tokenizer, other, "Hello there.")
    accepted = accept([task, other], rows, config, tokenizer)
    indices = [row.sample_index for row in accepted.completions if row.task_id == task.task_id]
    return indices, {r: n for r, n in accepted.summary.num_rejected.items() if n}


# --- each reason

SUMS = ("It is 4.", "It is 5.", "2 + 2 = 4", "I do not know")
LOOPS = ("No word of this text comes twice.", "again and " * 20)
SPELLINGS = ("It is 4.", "it  is 4. ", "It is 5.", "It is 5.", "It's 4.")


@pytest.mark.parametrize(
    ("task", "texts", "settings", "kept", "reasons"),
    [
        (checked(), SUMS, {}, [0, 2], {"wrong_answer": 2}),
        (checked(), SUMS, {"require_correct": False}, [0, 1, 2, 3], {}),
        (free(), ("Whatever.", "Something."), {}, [0, 1], {}),
        (free(), ("Whatever.",), {"min_pass_rate": 0.4, "max_pass_rate": 0.6}, [0], {}),
        (free(), ("", " \n", "A word."), {}, [2], {"empty": 2}),
        (free(), LOOPS, {}, [0], {"repetitive": 1}),
        (free(), LOOPS, {"max_repetition": 1.0}, [0, 1], {}),
        (free(), ("Hello there.",), {}, [0], {}),  # as another prompt's answer: no duplicate
        (checked(), SPELLINGS, {}, [0, 4], {"wrong_answer": 2, "duplicate": 1}),
        (
            checked(),
            ("5", "a 4", "a 4", "b 4", "c 4", "d 4"),
            {"max_per_prompt": 2},
            [1, 3],
            {"wrong_answer": 1, "duplicate": 1, "over_cap": 2},
        ),
    ],
)
def test_accept_keeps_and_drops_completions_for_reasons(
    tokenizer: Tokenizer,
    task: Task,
    texts: tuple[str, ...],
    settings: dict[str, Any],
    kept: list[int],
    reasons: dict[str, int],
) -> None:
    assert judge(tokenizer, task, *texts, **settings) == (kept, reasons)


def test_accept_drops_truncated_completions_if_asked(tokenizer: Tokenizer) -> None:
    task = free()
    cut, whole = answers(tokenizer, task, "Cut off in the", "Complete.")
    rows = [dataclasses.replace(cut, finish_reason="length"), whole]
    for drop, kept in ((True, rows[1:]), (False, rows)):
        config = LOOSE.model_copy(update={"drop_truncated": drop})
        accepted = accept([task], rows, config, tokenizer)
        assert list(accepted.completions) == kept
        assert accepted.summary.num_rejected["truncated"] == 2 - len(kept)


def test_accept_drops_completions_in_a_script_that_was_not_asked_in(tokenizer: Tokenizer) -> None:
    texts = ("Plain words.", "Some 你好 words and π", "你好世界")
    assert judge(tokenizer, free(), *texts) == ([0], {"mixed_language": 2})
    assert judge(tokenizer, free(), *texts, max_foreign_letters=0.3)[0] == [0, 1]
    assert judge(tokenizer, free(prompt="你好, Cπ?"), *texts)[0] == [0, 1, 2]


@pytest.mark.parametrize(
    ("low", "high", "is_kept"),
    [(0.0, 1.0, True), (0.25, 1.0, True), (0.3, 1.0, False), (0.0, 0.25, True), (0.0, 0.2, False)],
)
def test_accept_drops_prompts_outside_the_pass_rate_band(
    tokenizer: Tokenizer, low: float, high: float, is_kept: bool
) -> None:
    indices, reasons = judge(
        tokenizer, checked(), "1", "2", "3", "4", min_pass_rate=low, max_pass_rate=high
    )
    assert indices == ([3] if is_kept else [])
    assert reasons == {"wrong_answer": 3} | ({} if is_kept else {"outside_pass_rate_band": 1})


@pytest.mark.parametrize(
    ("text", "finish_reason", "reason"),
    [
        ("да 5 " * 20, "length", "wrong_answer"),
        ("да 4 " * 20, "length", "truncated"),
        ("да 4 " * 20, "stop", "repetitive"),
        ("да: 4", "stop", "mixed_language"),
        ("Yes: 4", "stop", "duplicate"),
        ("No: 4", "stop", "outside_pass_rate_band"),
    ],
)
def test_accept_gives_the_first_reason_in_their_order(
    tokenizer: Tokenizer, text: str, finish_reason: str, reason: str
) -> None:
    """Each row has all the faults of the rows below it, or cannot have them."""
    task, other = checked(), free()
    first, row = answers(tokenizer, task, "Yes: 4", text)
    rows = [first, dataclasses.replace(row, finish_reason=finish_reason)]
    rows += answers(tokenizer, other, "Hello there.")
    config = AcceptConfig(max_per_prompt=1, min_pass_rate=0.1, max_pass_rate=0.1)
    rejected = accept([task, other], rows, config, tokenizer).summary.num_rejected
    expected = dict.fromkeys(REASONS, 0)
    expected["outside_pass_rate_band"] += 1  # the first one
    expected[reason] += 1
    assert rejected == expected


# --- answers


def test_accept_keeps_right_answers_in_another_spelling(tokenizer: Tokenizer) -> None:
    task = Task("mixed", "?", "12.6", "boxed", "math", "train")
    spellings = (r"12 \frac{3}{5}", r"12\frac35", "12 3/5", "x = 63/5", r"12.6\text{ cm}")
    texts = [rf"So $\boxed{{{spelling}}}$." for spelling in (*spellings, "123/5", "36/5")]
    assert judge(tokenizer, task, *texts) == ([0, 1, 2, 3, 4], {"wrong_answer": 2})


@pytest.mark.parametrize("opening", ["", "<think>\n"])
def test_accept_reads_answers_behind_the_reasoning(tokenizer: Tokenizer, opening: str) -> None:
    """The template of R1 opens it in the prompt, so that completions have its end only."""
    task = Task("sum", "?", "4", "boxed", "add", "train")
    begin = "" if opening else "<think>"
    texts = (
        rf"{begin}Is it \boxed{{4}}?",
        rf"{begin}Is it \boxed{{5}}?</think>It is \boxed{{4}}.",
        rf"{begin}Is it \boxed{{4}}?</think>I do not know.",
    )
    prompt = tokenizer.encode(f"Assistant: {opening}")
    rows = [
        dataclasses.replace(row, prompt_token_ids=prompt)
        for row in answers(tokenizer, task, *texts)
    ]
    accepted = accept([task], rows, LOOSE, tokenizer)
    assert [row.sample_index for row in accepted.completions] == [1]


def test_accept_asks_math_verify_where_canonical_forms_differ(tokenizer: Tokenizer) -> None:
    task = Task("square", "?", "(x+1)^2", "boxed", "math", "train")
    texts = [rf"\boxed{{{text}}}" for text in ("x^2+2x+1", "(1+x)^2", "x^2+1", "no", "(x+1)^2")]
    accepted = accept([task], answers(tokenizer, task, *texts), LOOSE, tokenizer)
    assert [row.sample_index for row in accepted.completions] == [0, 1, 4]
    opinion = accepted.summary.second_opinion
    assert (opinion.num_asked, opinion.num_right, opinion.num_undecided) == (3, 2, 0)


# --- the whole


def sampled(tokenizer: Tokenizer) -> tuple[list[Task], list[Completion]]:
    """Twenty prompts of both kinds and splits with four answers of all kinds each."""
    rng = random.Random(0)
    texts = ["It is 4.", "4", "four", "It is 5.", "да 4", "", "so 4 " * 20, "4 it is"]
    tasks, rows = [], []
    for index in range(20):
        split: Split = "test" if index % 5 == 4 else "train"
        make = checked if index % 2 else free
        tasks.append(make(f"task {index}", split=split))
        for row in answers(tokenizer, tasks[-1], *rng.choices(texts, k=4)):
            reason = rng.choice(["stop", "stop", "length"])
            rows.append(dataclasses.replace(row, finish_reason=reason))
    return tasks, rows


def test_accept_gives_every_completion_one_verdict(tokenizer: Tokenizer) -> None:
    tasks, rows = sampled(tokenizer)
    accepted = accept(tasks, rows, AcceptConfig(max_per_prompt=1), tokenizer)
    summary = accepted.summary
    train = [row for row in accepted.completions if row.split == "train"]
    assert summary.num_sampled == sum(row.split == "train" for row in rows) == 64
    assert summary.num_accepted == len(train) == len(set(train))
    assert summary.num_accepted + sum(summary.num_rejected.values()) == summary.num_sampled
    assert list(summary.num_rejected) == list(REASONS)
    assert sum(count > 0 for count in summary.num_rejected.values()) == len(REASONS) - 1
    assert summary.num_prompts == 16
    assert summary.num_prompts_accepted == len({row.task_id for row in train})


def test_accept_keeps_the_tasks_order_whatever_that_of_the_rows(tokenizer: Tokenizer) -> None:
    tasks, rows = sampled(tokenizer)
    shuffled = random.Random(1).sample(rows, len(rows))
    accepted = accept(tasks, shuffled, LOOSE, tokenizer)
    assert accepted == accept(tasks, rows, LOOSE, tokenizer)
    kept = set(accepted.completions)
    assert list(accepted.completions) == [row for row in rows if row in kept]


def test_accept_takes_the_first_sample_of_held_out_splits(tokenizer: Tokenizer) -> None:
    tasks = [checked("held out", "test"), free("unused", split="validation"), free()]
    rows = answers(tokenizer, tasks[0], "да 5 " * 20, "It is 4.")
    rows += answers(tokenizer, tasks[1], "", "A word.") + answers(tokenizer, tasks[2], "Hello.")
    accepted = accept(tasks, rows, AcceptConfig(min_pass_rate=1.0), tokenizer)
    assert accepted.completions == (rows[0], rows[2], rows[4])
    assert accepted.summary.num_held_out == 2
    assert accepted.summary.num_sampled == accepted.summary.num_accepted == 1


def test_accept_counts_verifiable_train_prompts_by_pass_rate(tokenizer: Tokenizer) -> None:
    rates = {"a": 0, "b": 1, "c": 3, "d": 7, "e": 9, "f": 10, "g": 10}
    tasks, rows = [free(), checked("test", "test")], []
    for task_id, num_correct in rates.items():
        task = checked(task_id)
        tasks.append(task)
        rows += answers(tokenizer, task, *["4"] * num_correct, *["5"] * (10 - num_correct))
    rows += answers(tokenizer, tasks[0], "Hello.") + answers(tokenizer, tasks[1], "4")
    summary = accept(tasks, rows, LOOSE, tokenizer).summary
    assert summary.pass_rate_histogram == (1, 1, 0, 1, 0, 0, 0, 1, 0, 3)


def test_accept_of_nothing_is_an_error_with_the_reasons(tokenizer: Tokenizer) -> None:
    rows = answers(tokenizer, checked(), "5", "6")
    with pytest.raises(ExportError, match=r'none of .* 2 completions .*"wrong_answer": 2.*loosen'):
        accept([checked()], rows, LOOSE, tokenizer)


def test_accept_without_train_tasks_may_accept_nothing(tokenizer: Tokenizer) -> None:
    task = checked(split="test")
    accepted = accept([task], answers(tokenizer, task, "5"), LOOSE, tokenizer)
    assert accepted.summary.num_held_out == len(accepted.completions) == 1


def test_accepted_survives_the_disk(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tasks, rows = sampled(tokenizer)
    accepted: AcceptedCompletions = accept(tasks, rows, AcceptConfig(), tokenizer)
    write_accepted(tmp_path, accepted)
    assert read_accepted(tmp_path) == accepted
    assert tuple(read_completions(tmp_path / ROWS_NAME)) == accepted.completions
    summary = json.loads((tmp_path / "accept.json").read_text())
    assert summary == json.loads(json.dumps(dataclasses.asdict(accepted.summary)))


# --- measures


@pytest.mark.parametrize(
    ("token_ids", "share"),
    [
        ([], 0.0),
        ([1, 1, 1], 0.0),
        ([1, 1, 1, 1], 0.0),
        ([1, 1, 1, 1, 1], 1 / 2),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),
        (list(range(50)), 0.0),
    ],
)
def test_repeated_share_of_four_grams(token_ids: list[int], share: float) -> None:
    assert repeated_share(token_ids) == pytest.approx(share, abs=1e-15)


@pytest.mark.parametrize(
    ("text", "prompt", "share"),
    [
        ("", "Hi", 0.0),
        ("42 + 1 = 43 🙂", "Hi", 0.0),
        ("naïve Ｆｕｌｌ 𝐛𝐨𝐥𝐝 ﬁ", "Hi", 0.0),
        ("abc где", "Hi", 0.5),
        ("abc где", "Кто?", 0.0),
        ("English", "Кто?", 0.0),
        ("你好", "Hi", 1.0),
        ("時々カタカナ", "ひらがな", 0.0),
        ("ひらがな", "漢字", 1.0),
        ("αβ ab", "Hi", 0.5),
    ],
)
def test_foreign_share_of_letters(text: str, prompt: str, share: float) -> None:
    assert foreign_share(text, prompt) == share
