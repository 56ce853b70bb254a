"""The teacher answers every prompt, through the same engine that serves it.

One JSON row per completion, written as it finishes; a rerun keeps the rows that are there. A
completion depends on its prompt, seed and sample index alone, so it does not matter which run drew
it. The samples of a prompt are one request: the prompt is prefilled once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bundle.atomic import write_atomically
from bundle.hashing import hash_json
from bundle.token_ids import read_eos_token_ids
from export.run.errors import ExportError
from export.run.settings import SampleConfig
from export.teacher.examples import Example
from export.teacher.tasks import Task
from serve.engine.engine import Engine
from serve.engine.offline import OfflineEngine
from serve.engine.sequence import FinishReason, GenerationRequest
from serve.errors import InvalidFieldError
from serve.models.torch_backend import TorchBackend
from serve.sampling.params import SamplingParams
from serve.text.tokenizer import Tokenizer

ROWS_NAME = "completions.jsonl"
_USABLE = (FinishReason.STOP.value, FinishReason.LENGTH.value)


RowKey = tuple[str, int]
"""Task id and sample index."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The teacher's answer to one task; `sample_index` counts the task's answers from 0."""

    task_id: str
    split: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: str
    sample_index: int = 0

    @property
    def key(self) -> RowKey:
        return self.task_id, self.sample_index

    @property
    def example(self) -> Example:
        return Example(self.prompt_token_ids, self.token_ids)


def sample_teacher(
    teacher_dir: Path,
    tasks: Sequence[Task],
    config: SampleConfig,
    target_dir: Path,
    progress: Callable[[int, int], None],
    tokenizer: Tokenizer | None = None,
) -> list[Completion]:
    """Write `completions.jsonl` and return its rows, in order of the tasks and sample indices.

    A task whose answer can be checked gets `num_verifiable_samples` rows, another `num_samples`;
    `progress` is told how many rows there are, and of how many. `tokenizer` is the teacher's, with
    the date that its chat template tells; without it the folder's, with today's.

    Raises:
        ExportError: the chat template refuses a prompt, it is too long for `max_model_len`, or
            the teacher failed at an answer.
    """
    path = target_dir / ROWS_NAME
    keys = [(task.task_id, i) for task in tasks for i in range(num_samples_of(task, config))]
    rows = {row.key: row for row in read_completions(path)} if path.exists() else {}
    rows = {key: rows[key] for key in keys if key in rows}
    unfinished = {task_id for task_id, index in keys if (task_id, index) not in rows}
    if unfinished:
        missing = [task for task in tasks if task.task_id in unfinished]
        write_completions(path, rows.values())
        with path.open("a", encoding="utf-8") as file:
            for row in _generate(teacher_dir, missing, config, tokenizer):
                if row.key in rows:  # redrawn with a sibling that is missing: the same tokens
                    continue
                file.write(json.dumps(asdict(row)) + "\n")
                file.flush()
                rows[row.key] = row
                progress(len(rows), len(keys))
    ordered = [rows[key] for key in keys]
    write_completions(path, ordered)
    return ordered


def num_samples_of(task: Task, config: SampleConfig) -> int:
    return config.num_verifiable_samples if task.is_verifiable else config.num_samples


def read_completions(path: Path) -> list[Completion]:
    """Read rows, leaving out a last one that a kill cut short."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            raw = json.loads(line)
            raw["prompt_token_ids"] = tuple(raw["prompt_token_ids"])
            raw["token_ids"] = tuple(raw["token_ids"])
            rows.append(Completion(**raw))
    return rows


def write_completions(path: Path, rows: Iterable[Completion]) -> None:
    """Write all rows at once, by rename."""
    with write_atomically(path) as partial:
        partial.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), "utf-8")


def _generate(
    teacher_dir: Path, tasks: Sequence[Task], config: SampleConfig, tokenizer: Tokenizer | None
) -> Iterable[Completion]:
    tokenizer = tokenizer or Tokenizer.load(teacher_dir)
    backend = TorchBackend.load(
        teacher_dir,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=getattr(torch, config.dtype),
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        real_tokens=tokenizer.real_tokens,
    )
    backend.choose_kernels()  # a resumed run has other batches, and must have the same answers
    engine = Engine(
        backend,
        eos_token_ids=read_eos_token_ids(teacher_dir),
        max_waiting=sum(num_samples_of(task, config) for task in tasks),
        name="sampling teacher",
    )
    yield from _answers(engine, tokenizer, tasks, config)


def _answers(
    engine: Engine, tokenizer: Tokenizer, tasks: Sequence[Task], config: SampleConfig
) -> Iterable[Completion]:
    by_id = {task.task_id: task for task in tasks}
    requests = [_request(tokenizer, task, config) for task in tasks]
    for request, event in OfflineEngine(engine).generate(requests):
        task, reason = by_id[request.request_id], event.finish_reason.value
        if reason not in _USABLE:
            raise ExportError(
                f"the teacher's answer to task {task.task_id} ended with "
                f"{reason}: the log says why; finished rows are kept"
            )
        yield Completion(
            task.task_id,
            task.split,
            request.prompt_token_ids,
            event.token_ids,
            reason,
            event.index,
        )


def _request(tokenizer: Tokenizer, task: Task, config: SampleConfig) -> GenerationRequest:
    sampling = SamplingParams(
        num_samples=num_samples_of(task, config),
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        seed=task_seed(config.seed, task.task_id),
    )
    return GenerationRequest(task.task_id, _encode(tokenizer, task, config), sampling)


def _encode(tokenizer: Tokenizer, task: Task, config: SampleConfig) -> tuple[int, ...]:
    try:
        prompt = tokenizer.encode_chat(task.messages)
    except InvalidFieldError as error:
        raise ExportError(f"the teacher cannot be asked task {task.task_id}: {error}") from None
    if len(prompt) + config.max_tokens > config.max_model_len:
        raise ExportError(
            f"task {task.task_id}: {len(prompt)} prompt tokens + sample.max_tokens "
            f"{config.max_tokens} exceed sample.max_model_len {config.max_model_len}"
        )
    return prompt


def task_seed(seed: int, task_id: str) -> int:
    """Return the sampling seed of one task, which no other task's presence changes."""
    return int(hash_json([seed, task_id])[:16], 16)
