"""How often each model solves tasks whose answer can be checked: pass@k and maj@n.

Every model samples n completions of every task in the engine that serves it. A completion depends
on its model, its task and its sample index alone, never on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bundle.hashing import hash_json
from estimators.bootstrap import bootstrap_mean
from estimators.consensus import majority_vote, vote_correctness
from estimators.pass_at_k import pass_at_k
from export.measure.summary import PassRates, SolvedTasks, TaskSummary
from export.run.errors import ExportError
from export.run.settings import EvaluateConfig
from export.teacher.grading import Grade, SecondOpinion, ask_second_opinion, grade
from export.teacher.sample import task_seed
from export.teacher.tasks import Task
from serve.engine.engine import Engine
from serve.engine.offline import OfflineEngine
from serve.engine.sequence import FinishedEvent, FinishReason, GenerationRequest
from serve.models.backend import Backend
from serve.pair.answers.formats import starts_in_reasoning
from serve.sampling.params import SamplingParams
from serve.text.tokenizer import Tokenizer

_USABLE = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class TaskCompletion:
    """One sampled answer to one task. `answer` is canonical, None where the text has none.

    `finish_reason` "error" means that the model's logits were no numbers; such a completion is
    wrong, its text what came before.
    """

    model: str
    task_id: str
    sample_index: int
    text: str
    num_tokens: int
    finish_reason: str
    answer: str | None
    is_correct: bool


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What one model made of one task. `majority` is the correctness of its majority vote: the
    share of right answers in a tie, 0 when no sample has an answer."""

    task_id: str
    family: str
    num_samples: int
    num_correct: int
    majority: float


@dataclass(frozen=True, slots=True)
class TaskEvaluation:
    """All models over the same tasks; `results` and `completions` follow the tasks' order."""

    config: EvaluateConfig
    results: Mapping[str, tuple[TaskResult, ...]]
    completions: tuple[TaskCompletion, ...]
    second_opinion: SecondOpinion = field(default_factory=SecondOpinion)

    def pass_rates(self, model: str, family: str | None = None) -> PassRates:
        """Return a model's scores over all tasks, or over those of one family."""
        results = [r for r in self.results[model] if family in (None, r.family)]
        num_correct = [r.num_correct for r in results]
        n = self.config.num_samples
        return PassRates(
            num_prompts=len(results),
            pass_at_k={
                k: bootstrap_mean(pass_at_k(n, num_correct, k)) for k in sorted({1, *self.config.k})
            },
            majority_at_n=bootstrap_mean([r.majority for r in results]),
        )

    def summary(self) -> TaskSummary:
        """Return the section `tasks` of `summary.json`."""
        first = next(iter(self.results.values()))
        families = sorted({result.family for result in first})
        return TaskSummary(
            tasks_sha256=hash_json([result.task_id for result in first]),
            num_samples=self.config.num_samples,
            temperature=self.config.temperature,
            max_tokens=self.config.task_max_tokens,
            seed=self.config.seed,
            second_opinion=self.second_opinion,
            models={
                model: SolvedTasks(
                    self.pass_rates(model),
                    {family: self.pass_rates(model, family) for family in families},
                    self._num_failed(model),
                )
                for model in self.results
            },
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of `per_prompt.jsonl` of kind "task".

        Keys: `task_id`, `family`, `num_samples`, and by model `num_correct` and `majority`.
        """
        by_task = zip(*self.results.values(), strict=True)
        return [
            {
                "kind": "task",
                "task_id": results[0].task_id,
                "family": results[0].family,
                "num_samples": results[0].num_samples,
                "num_correct": {
                    m: r.num_correct for m, r in zip(self.results, results, strict=True)
                },
                "majority": {m: r.majority for m, r in zip(self.results, results, strict=True)},
            }
            for results in by_task
        ]

    def _num_failed(self, model: str) -> int:
        usable = [reason.value for reason in _USABLE]
        return sum(c.model == model and c.finish_reason not in usable for c in self.completions)


def choose_tasks(tasks: Iterable[Task], max_task_prompts: int) -> list[Task]:
    """Return the first test tasks whose answer can be checked, in order."""
    verifiable = [task for task in tasks if task.split == "test" and task.is_verifiable]
    return verifiable[:max_task_prompts]


def evaluate_tasks(
    tasks: Sequence[Task],
    backends: Mapping[str, Backend],
    tokenizer: Tokenizer,
    eos_token_ids: frozenset[int],
    config: EvaluateConfig,
    progress: Callable[[int, int], None],
) -> TaskEvaluation:
    """Let every model answer every task `config.num_samples` times; `progress` counts completions.

    Raises:
        ExportError: an answer cannot be checked, or prompt and completion exceed a model's length.
    """
    assert tasks and backends, "nothing to evaluate"
    for task in tasks:
        _check_verifiable(task)
    requests = [_request(task, tokenizer, config) for task in tasks]
    for model, backend in backends.items():
        _check_fits(model, backend, requests)
    total = len(backends) * len(tasks) * config.num_samples
    events: dict[tuple[str, str, int], FinishedEvent] = {}
    for model, backend in backends.items():
        engine = _engine(model, backend, eos_token_ids, requests)
        for request, event in engine.generate(requests):
            events[model, request.request_id, event.index] = event
            progress(len(events), total)
    completions, second_opinion = _judge(tasks, requests, events, tokenizer)
    by_task: dict[tuple[str, str], list[TaskCompletion]] = {}
    for completion in completions:
        by_task.setdefault((completion.model, completion.task_id), []).append(completion)
    results = {
        model: tuple(_result(task, by_task[model, task.task_id]) for task in tasks)
        for model in backends
    }
    return TaskEvaluation(config, results, tuple(completions), second_opinion)


def _check_verifiable(task: Task) -> None:
    if not task.is_verifiable:
        raise ExportError(f"task {task.task_id} ({task.family}) has no answer to check against")


def _request(task: Task, tokenizer: Tokenizer, config: EvaluateConfig) -> GenerationRequest:
    sampling = SamplingParams(
        num_samples=config.num_samples,
        temperature=config.temperature,
        max_tokens=config.task_max_tokens,
        seed=task_seed(config.seed, task.task_id),
    )
    prompt_token_ids = tokenizer.encode_chat(task.messages)
    return GenerationRequest(task.task_id, prompt_token_ids, sampling)


def _check_fits(model: str, backend: Backend, requests: Sequence[GenerationRequest]) -> None:
    for request in requests:
        num_prompt_tokens, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
        if num_prompt_tokens + max_tokens > backend.info.max_model_len:
            raise ExportError(
                f"task {request.request_id}: its {num_prompt_tokens} prompt tokens and "
                f"evaluate.task_max_tokens {max_tokens} exceed the {backend.info.max_model_len} "
                f"positions of {model!r}"
            )


def _engine(
    model: str,
    backend: Backend,
    eos_token_ids: frozenset[int],
    requests: Sequence[GenerationRequest],
) -> OfflineEngine:
    num_samples = sum(request.sampling.num_samples for request in requests)
    return OfflineEngine(
        Engine(backend, eos_token_ids=eos_token_ids, name=model, max_waiting=num_samples)
    )


def _judge(
    tasks: Sequence[Task],
    requests: Sequence[GenerationRequest],
    events: Mapping[tuple[str, str, int], FinishedEvent],
    tokenizer: Tokenizer,
) -> tuple[list[TaskCompletion], SecondOpinion]:
    """Return all completions in order of models, tasks and samples, and what math-verify said."""
    place = {task.task_id: (index, task) for index, task in enumerate(tasks)}
    thinks = {r.request_id: starts_in_reasoning(r.prompt_token_ids, tokenizer) for r in requests}
    models = {model: index for index, model in enumerate(dict.fromkeys(m for m, _, _ in events))}
    keys = sorted(events, key=lambda key: (models[key[0]], place[key[1]][0], key[2]))
    texts = [tokenizer.decode_with_reasoning(events[key].token_ids) for key in keys]
    grades, second_opinion = ask_second_opinion(
        [place[task_id][1] for _, task_id, _ in keys],
        [
            grade(place[task_id][1], text, starts_in_reasoning=thinks[task_id])
            for (_, task_id, _), text in zip(keys, texts, strict=True)
        ],
    )
    completions = [
        _completion(key[0], key[1], events[key], text, one)
        for key, text, one in zip(keys, texts, grades, strict=True)
    ]
    return completions, second_opinion


def _completion(
    model: str, task_id: str, event: FinishedEvent, text: str, one: Grade
) -> TaskCompletion:
    return TaskCompletion(
        model=model,
        task_id=task_id,
        sample_index=event.index,
        text=text,
        num_tokens=len(event.token_ids),
        finish_reason=event.finish_reason.value,
        answer=one.answer,
        is_correct=event.finish_reason in _USABLE and bool(one.is_correct),
    )


def _result(task: Task, completions: Sequence[TaskCompletion]) -> TaskResult:
    right_answers = {c.answer for c in completions if c.is_correct}
    vote = majority_vote(c.answer for c in completions)
    return TaskResult(
        task_id=task.task_id,
        family=task.family,
        num_samples=len(completions),
        num_correct=sum(c.is_correct for c in completions),
        majority=vote_correctness(vote, right_answers.__contains__) or 0.0,
    )
