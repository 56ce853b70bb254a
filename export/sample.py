"""The teacher answers every prompt, through the same engine that serves it.

One JSON row per completion, written as it finishes; a rerun keeps the rows that are there. A
completion depends on its prompt and seed alone, so it does not matter which run drew it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bundle.hashing import hash_json
from export.config import ExportError, SampleConfig
from export.distill import Example
from export.tasks import Task
from serve.engine import Engine
from serve.loading import read_eos_token_ids
from serve.sequence import Event, FinishedEvent, FinishReason, GenerationRequest, SamplingParams
from serve.tokenization import Tokenizer
from serve.torch_backend import TorchBackend

ROWS_NAME = "completions.jsonl"
_USABLE = (FinishReason.STOP.value, FinishReason.LENGTH.value)


@dataclass(frozen=True, slots=True)
class Completion:
    """The teacher's answer to one task."""

    task_id: str
    split: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: str

    @property
    def example(self) -> Example:
        return Example(self.prompt_token_ids, self.token_ids)


def sample_teacher(
    teacher_dir: Path,
    tasks: Sequence[Task],
    config: SampleConfig,
    target_dir: Path,
    progress: Callable[[int, int], None],
) -> list[Completion]:
    """Write `completions.jsonl` with one row per task and return the rows in the tasks' order."""
    path = target_dir / ROWS_NAME
    rows = {row.task_id: row for row in read_completions(path)} if path.exists() else {}
    missing = [task for task in tasks if task.task_id not in rows]
    if missing:
        write_completions(path, rows.values())
        with path.open("a", encoding="utf-8") as file:
            for row in _generate(teacher_dir, missing, config):
                file.write(json.dumps(asdict(row)) + "\n")
                file.flush()
                rows[row.task_id] = row
                progress(len(rows), len(tasks))
    ordered = [rows[task.task_id] for task in tasks]
    write_completions(path, ordered)
    return ordered


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
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def _generate(
    teacher_dir: Path, tasks: Sequence[Task], config: SampleConfig
) -> Iterable[Completion]:
    tokenizer = Tokenizer.load(teacher_dir)
    engine = Engine(
        TorchBackend.load(
            teacher_dir,
            device="cuda" if torch.cuda.is_available() else "cpu",
            dtype=getattr(torch, config.dtype),
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
        ),
        eos_token_ids=read_eos_token_ids(teacher_dir),
        max_waiting=len(tasks),
        name="sampling teacher",
    )
    yield from _answers(engine, tokenizer, tasks, config)


def _answers(
    engine: Engine, tokenizer: Tokenizer, tasks: Sequence[Task], config: SampleConfig
) -> Iterable[Completion]:
    finished: list[Completion] = []
    for task in tasks:
        prompt = tokenizer.encode_chat([("user", task.prompt)])
        sampling = SamplingParams(
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            seed=task_seed(config.seed, task.task_id),
        )
        request = GenerationRequest(task.task_id, prompt, sampling)
        engine.submit(request, _sink(task, prompt, finished))
    for _ in engine.run():
        for completion in finished:
            if completion.finish_reason not in _USABLE:
                raise ExportError(
                    f"the teacher's answer to task {completion.task_id} ended with "
                    f"{completion.finish_reason}: the log says why; finished rows are kept"
                )
            yield completion
        finished.clear()


def _sink(
    task: Task, prompt: tuple[int, ...], finished: list[Completion]
) -> Callable[[list[Event]], None]:
    def sink(events: list[Event]) -> None:
        for event in events:
            if isinstance(event, FinishedEvent):
                reason = event.finish_reason.value
                finished.append(
                    Completion(task.task_id, task.split, prompt, event.token_ids, reason)
                )

    return sink


def task_seed(seed: int, task_id: str) -> int:
    """Return the sampling seed of one task, which no other task's presence changes."""
    return int(hash_json([seed, task_id])[:16], 16)
