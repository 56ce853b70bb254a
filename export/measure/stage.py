"""The stage `evaluate`: every variant, the float student and the teacher, on the same prompts.

Writes `summary.json` (`export.measure.summary`), `per_prompt.jsonl` (`export.measure.held_out`) and
`texts.jsonl`: what teacher and student said, for people to read side by side.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bundle.token_ids import read_eos_token_ids
from export.measure.held_out import HeldOut, evaluate
from export.measure.memory import measure_peak_bytes
from export.measure.speed import PROMPT_TOKENS, race, tandem_contender, transformers_contender
from export.measure.summary import (
    STUDENT,
    TEACHER,
    TORCH,
    TRANSFORMERS,
    EvalSummary,
    Speed,
    write_summary,
)
from export.measure.task_scores import TaskEvaluation, choose_tasks, evaluate_tasks
from export.run.artifacts import Artifacts
from export.run.settings import ExportConfig
from export.run.stages import RunReporter
from export.student.on_policy import AnswerSettings, answer_with
from export.teacher.accept import read_accepted
from export.teacher.model_files import load_model
from export.teacher.sample import Completion
from export.teacher.tasks import Task
from serve.text.tokenizer import Tokenizer

PER_PROMPT_NAME = "per_prompt.jsonl"
TEXTS_NAME = "texts.jsonl"


@dataclass(frozen=True)
class EvaluationStage:
    """The models of one evaluation, loaded once; `tokenizer` is the teacher's."""

    config: ExportConfig
    teacher_dir: Path
    artifacts: Artifacts
    tokenizer: Tokenizer
    tasks: Sequence[Task]
    reporter: RunReporter

    def run(self, folder: Path) -> dict[str, Any]:
        """Measure everything and fill `folder`; returns the stage's summary for people."""
        held_out, tasks = self._held_out(), self._solved()
        summary = EvalSummary(
            prompts_sha256=held_out.prompts_sha256,
            num_prompts=len(held_out.prompts),
            num_tokens=held_out.num_tokens,
            quality=held_out.quality,
            perplexity=held_out.perplexity,
            tasks=tasks.summary() if tasks else None,
            speed=self._speed(),
            memory=self._memory(),
        )
        write_summary(folder, summary)
        _write_rows(folder / PER_PROMPT_NAME, held_out.rows() + (tasks.rows() if tasks else []))
        _write_rows(folder / TEXTS_NAME, self._texts(held_out))
        student = summary.quality[TEACHER][STUDENT]
        return {
            "student_kl": student.forward_kl,
            "argmax_agreement": student.argmax_agreement,
            "tokens": student.num_tokens,
        }

    def _held_out(self) -> HeldOut:
        examples = [row.example for row in self._test]
        show = self.reporter.track("held-out prompts")
        return evaluate(self._backends, (TEACHER, STUDENT), examples, show)

    def _solved(self) -> TaskEvaluation | None:
        """Return pass@k and maj@n of every model, None where no task can be checked."""
        if not self._chosen:
            return None
        return evaluate_tasks(
            self._chosen, self._backends, self.tokenizer, self._eos_token_ids,
            self.config.evaluate, self.reporter.track("task answers"),
        )  # fmt: skip

    def _speed(self) -> dict[str, Speed]:
        """Race every variant against the teacher in bfloat16, in torch and in transformers."""
        self.reporter.say("speed: every model in turn, one sequence")
        racing = {n: b for n, b in self._backends.items() if n not in (TEACHER, STUDENT)}
        racing[TORCH] = self._load_torch(self.teacher_dir, torch.bfloat16)
        contenders = {name: tandem_contender(backend) for name, backend in racing.items()}
        contenders[TRANSFORMERS] = transformers_contender(
            load_model(self.teacher_dir, torch.bfloat16)
        )
        config, vocab_size = self.config.evaluate, self._backends[TEACHER].info.vocab_size
        return race(contenders, vocab_size, config.num_timed_tokens, config.num_rounds)

    def _memory(self) -> dict[str, int]:
        """Return each variant's peak bytes, by variant."""
        graphs = self.artifacts.measured_graphs
        return {name: measure_peak_bytes(folder) for name, folder in graphs.items()}

    def _texts(self, held_out: HeldOut) -> list[dict[str, Any]]:
        """Return what the teacher said to each held-out prompt, and what the student says."""
        settings = AnswerSettings(
            temperature=self.config.sample.temperature,
            max_tokens=self.config.sample.max_tokens,
            max_num_seqs=self.config.evaluate.max_num_seqs,
            eos_token_ids=self._eos_token_ids,
            seed=self.config.evaluate.seed,
        )
        prompts = [row.prompt_token_ids for row in self._test]
        answers = answer_with(self._backends[STUDENT], prompts, settings)
        by_id = {task.task_id: task for task in self.tasks}
        return [
            {
                "prompt": by_id[row.task_id].text,
                "teacher": self.tokenizer.decode(row.token_ids),
                "student": self.tokenizer.decode(said.completion_token_ids),
                "forward_kl": measured["forward_kl"][TEACHER][STUDENT],
            }
            for row, said, measured in zip(self._test, answers, held_out.rows(), strict=True)
        ]

    @cached_property
    def _test(self) -> list[Completion]:
        found = read_accepted(self.artifacts.accepted).completions
        return [row for row in found if row.split == "test"]

    @cached_property
    def _chosen(self) -> list[Task]:
        return choose_tasks(self.tasks, self.config.evaluate.max_task_prompts)

    @cached_property
    def _eos_token_ids(self) -> frozenset[int]:
        return read_eos_token_ids(self.teacher_dir)

    @cached_property
    def _backends(self) -> Mapping[str, Any]:
        from serve.models.onnx_backend import OnnxBackend

        graphs = self.artifacts.measured_graphs
        backends: dict[str, Any] = {
            name: OnnxBackend.load(folder, **self._size) for name, folder in graphs.items()
        }
        backends[STUDENT] = self._load_torch(self.artifacts.student, torch.float32)
        backends[TEACHER] = self._load_torch(self.teacher_dir, torch.float32)
        return backends

    def _load_torch(self, folder: Path, dtype: torch.dtype) -> Any:
        from serve.models.torch_backend import TorchBackend

        return TorchBackend.load(folder, dtype=dtype, **self._size)

    @cached_property
    def _size(self) -> dict[str, Any]:
        config, longest_answer = self.config.evaluate, self.config.sample.max_tokens
        task_prompts = [self.tokenizer.encode_chat(t.messages) for t in self._chosen]
        lengths = [
            PROMPT_TOKENS + config.num_timed_tokens + 1,
            *(len(row.prompt_token_ids) + longest_answer for row in self._test),
            *(len(prompt) + config.task_max_tokens for prompt in task_prompts),
        ]
        return {
            "device": "cpu",
            "max_num_seqs": config.max_num_seqs,
            "max_model_len": max(lengths),
            "real_tokens": self.tokenizer.real_tokens,
        }


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
