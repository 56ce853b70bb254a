"""The stage `evaluate`: every variant, the float student and the teacher, on the same prompts.

Writes `summary.json`, `per_prompt.jsonl` (both described in `export.measure.held_out`) and
`texts.jsonl`: what teacher and students said, for people to read side by side.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bundle.token_ids import read_eos_token_ids
from export.measure.held_out import STUDENT, TEACHER, HeldOut, evaluate
from export.measure.memory import measure_peak_bytes
from export.measure.speed import PROMPT_TOKENS, race, tandem_contender, transformers_contender
from export.measure.task_scores import TaskEvaluation, choose_tasks, evaluate_tasks
from export.publish.gates import SUMMARY_NAME, TORCH, TRANSFORMERS
from export.run.files import write_json
from export.student.on_policy import AnswerSettings
from export.teacher.accept import read_accepted
from export.teacher.examples import Example
from export.teacher.model_files import load_model

if TYPE_CHECKING:
    from export.pipeline import Pipeline

PER_PROMPT_NAME = "per_prompt.jsonl"
TEXTS_NAME = "texts.jsonl"


def run_evaluation(pipeline: Pipeline, folder: Path) -> dict[str, Any]:
    """Measure everything and fill `folder`; returns the stage's summary for people."""
    evaluation = _Evaluation(pipeline)
    held_out = evaluation.held_out()
    tasks = evaluation.tasks()
    summary = {
        **held_out.summary(),
        **({"tasks": tasks.summary()} if tasks else {}),
        "speed": evaluation.speed(),
        "memory": evaluation.memory(),
    }
    write_json(folder / SUMMARY_NAME, summary)
    rows = held_out.rows() + (tasks.rows() if tasks else [])
    _write_rows(folder / PER_PROMPT_NAME, rows)
    _write_rows(folder / TEXTS_NAME, evaluation.texts(held_out))
    student = held_out.agreements[TEACHER, STUDENT]
    return {
        "student_kl": student.forward_kl,
        "argmax_agreement": student.argmax_agreement,
        "tokens": student.num_tokens,
    }


class _Evaluation:
    """The models of one evaluation, loaded once."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._config = pipeline.config.evaluate
        self._test = [row for row in read_accepted(pipeline.path(pipeline.accepted)).completions
                      if row.split == "test"]  # fmt: skip
        self._tokenizer = pipeline.tokenizer
        self._eos_token_ids = read_eos_token_ids(pipeline.teacher.path)
        self._chosen = choose_tasks(pipeline.tasks, self._config.max_task_prompts)
        self._backends = self._load_backends()

    def held_out(self) -> HeldOut:
        show = self._pipeline.reporter.track("held-out prompts")
        return evaluate(self._backends, (TEACHER, STUDENT), self._examples, show)

    def tasks(self) -> TaskEvaluation | None:
        """Return pass@k and maj@n of every model, None where no task can be checked."""
        if not self._chosen:
            return None
        return evaluate_tasks(
            self._chosen, self._backends, self._tokenizer, self._eos_token_ids, self._config,
            self._pipeline.reporter.track("task answers"),
        )  # fmt: skip

    def speed(self) -> dict[str, Any]:
        """Race every variant against the teacher in bfloat16, in torch and in transformers."""
        self._pipeline.reporter.say("speed: every model in turn, one sequence")
        racing = {n: b for n, b in self._backends.items() if n not in (TEACHER, STUDENT)}
        racing[TORCH] = self._load_torch(self._pipeline.teacher.path, torch.bfloat16)
        contenders = {name: tandem_contender(backend) for name, backend in racing.items()}
        contenders[TRANSFORMERS] = transformers_contender(
            load_model(self._pipeline.teacher.path, torch.bfloat16)
        )
        vocab_size = self._backends[TEACHER].info.vocab_size
        config = self._config
        speeds = race(contenders, vocab_size, config.num_timed_tokens, config.num_rounds)
        return {name: asdict(speed) for name, speed in speeds.items()}

    def memory(self) -> dict[str, int]:
        """Return each variant's peak bytes, by variant."""
        graphs = self._pipeline.measured_graphs
        return {name: measure_peak_bytes(folder) for name, folder in graphs.items()}

    def texts(self, held_out: HeldOut) -> list[dict[str, Any]]:
        """Return what the teacher said to each held-out prompt, and what the student says."""
        from export.student.on_policy import answer_with

        sample = self._pipeline.config.sample
        settings = AnswerSettings(
            temperature=sample.temperature,
            max_tokens=sample.max_tokens,
            max_num_seqs=self._config.max_num_seqs,
            eos_token_ids=self._eos_token_ids,
            seed=self._config.seed,
        )
        prompts = [row.prompt_token_ids for row in self._test]
        answers = answer_with(self._backends[STUDENT], prompts, settings)
        by_id = {task.task_id: task for task in self._pipeline.tasks}
        return [
            {
                "prompt": by_id[row.task_id].text,
                "teacher": self._tokenizer.decode(row.token_ids),
                "student": self._tokenizer.decode(said.completion_token_ids),
                "forward_kl": measured["forward_kl"][TEACHER][STUDENT],
            }
            for row, said, measured in zip(self._test, answers, held_out.rows(), strict=True)
        ]

    @property
    def _examples(self) -> list[Example]:
        return [row.example for row in self._test]

    def _load_backends(self) -> Mapping[str, Any]:
        from serve.models.onnx_backend import OnnxBackend

        pipeline = self._pipeline
        backends: dict[str, Any] = {
            name: OnnxBackend.load(folder, **self._size)
            for name, folder in pipeline.measured_graphs.items()
        }
        backends[STUDENT] = self._load_torch(pipeline.path(pipeline.distilled), torch.float32)
        backends[TEACHER] = self._load_torch(pipeline.teacher.path, torch.float32)
        return backends

    def _load_torch(self, folder: Path, dtype: torch.dtype) -> Any:
        from serve.models.torch_backend import TorchBackend

        return TorchBackend.load(folder, dtype=dtype, **self._size)

    @property
    def _size(self) -> dict[str, Any]:
        config = self._config
        task_prompts = [self._tokenizer.encode_chat(t.messages) for t in self._chosen]
        longest_answer = self._pipeline.config.sample.max_tokens
        lengths = [
            PROMPT_TOKENS + config.num_timed_tokens + 1,
            *(len(row.prompt_token_ids) + longest_answer for row in self._test),
            *(len(prompt) + config.task_max_tokens for prompt in task_prompts),
        ]
        return {
            "device": "cpu",
            "max_num_seqs": config.max_num_seqs,
            "max_model_len": max(lengths),
            "real_tokens": self._tokenizer.real_tokens,
        }


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
