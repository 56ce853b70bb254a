"""What is asked: the built-in verifiable tasks, a file of the user's own, or words by length."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from bundle.errors import UserError
from export.teacher.task_sources import load_jsonl as load_jsonl
from export.teacher.tasks import Task, builtin_tasks
from loadtest.config import BUILTIN, RunConfig
from loadtest.records import DatasetPrompt

_SYNTHETIC = "synthetic:"
_LENGTHS = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})")
_WORD = re.compile(r"\b[a-z]{2,}\b")


def load_prompts(config: RunConfig) -> list[DatasetPrompt]:
    """Return `config.max_prompts` prompts of the dataset at most, its first ones.

    * `builtin`: the verifiable tasks of the test split, which no student was trained on.
    * a JSONL file: rows as `tandem export` takes them; the split is ignored.
    * `synthetic:WORDSxTOKENS`: prompts of so many random words, answers of so many tokens, whether
      or not the model would end there; nothing to judge.

    Raises:
        UserError: the dataset is none of these, or a file is broken; names path, line and key.
    """
    if config.dataset.startswith(_SYNTHETIC):
        return _synthetic(config)
    if config.dataset == BUILTIN:
        tasks = [task for task in builtin_tasks() if task.split == "test" and task.is_verifiable]
    else:
        tasks = load_jsonl(_path_of(config.dataset))
    return [_to_prompt(task) for task in tasks[: config.max_prompts]]


def _path_of(dataset: str) -> Path:
    path = Path(dataset).expanduser()
    if not path.is_file():
        raise UserError(
            f"dataset {dataset!r} is no file; give one of JSON lines, {BUILTIN}, or "
            f"{_SYNTHETIC}PROMPT_WORDSxMAX_TOKENS"
        )
    return path


def _to_prompt(task: Task) -> DatasetPrompt:
    if task.turns:
        raise UserError(
            f"task {task.task_id} of the dataset is a chat of several turns; a load test sends "
            "single prompts"
        )
    return DatasetPrompt(task.task_id, task.prompt, task.answer, task.answer_format)


def _synthetic(config: RunConfig) -> list[DatasetPrompt]:
    lengths = _LENGTHS.fullmatch(config.dataset.removeprefix(_SYNTHETIC))
    if lengths is None:
        raise UserError(
            f"dataset {config.dataset!r}: lengths are PROMPT_WORDSxMAX_TOKENS, both 1 to 999999, "
            f"such as {_SYNTHETIC}128x64"
        )
    num_words, num_tokens = map(int, lengths.groups())
    words = sorted({word for task in builtin_tasks() for word in _WORD.findall(task.prompt)})
    rng = np.random.default_rng(config.seed)
    return [
        DatasetPrompt(
            prompt_id=f"synthetic-{index}",
            text=" ".join(rng.choice(words, size=num_words)),
            max_tokens=num_tokens,
            ignore_eos=True,
        )
        for index in range(config.max_prompts)
    ]
