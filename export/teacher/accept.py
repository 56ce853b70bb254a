"""Rejection sampling: which of the teacher's completions the student is trained on.

DeepSeek-R1 (arXiv 2501.12948, section 2.3.3) samples several completions per prompt, keeps the
correct ones and drops what is hard to read: mixed languages and rambling. Here every completion of
the train split gets one verdict, the first of `REASONS` that applies, or it is accepted. Held-out
text is not chosen: of the test split, sample 0 passes whatever it says.
"""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from export.run.errors import ExportError
from export.run.settings import AcceptConfig
from export.teacher.examples import Example
from export.teacher.grading import Grade, SecondOpinion, ask_second_opinion, grade
from export.teacher.sample import ROWS_NAME, Completion, read_completions, write_completions
from export.teacher.tasks import Task
from serve.engine.sequence import FinishReason
from serve.pair.answers.formats import starts_in_reasoning
from serve.text.tokenizer import Tokenizer

Reason = Literal[
    "wrong_answer",
    "truncated",
    "empty",
    "repetitive",
    "mixed_language",
    "duplicate",
    "outside_pass_rate_band",
    "over_cap",
]
REASONS: tuple[Reason, ...] = get_args(Reason)

SUMMARY_NAME = "accept.json"
NUM_PASS_RATE_BINS = 10
_NGRAM = 4
_TRAIN = "train"
# Chinese and Japanese iteration marks and the like; the two syllabaries of Japanese.
_SCRIPT_OF_NAME = {
    "IDEOGRAPHIC": "CJK",
    "HIRAGANA": "KANA",
    "KATAKANA": "KANA",
    "KATAKANA-HIRAGANA": "KANA",
}


@dataclass(frozen=True, slots=True)
class AcceptSummary:
    """Counts over the train split, and how many completions of other splits are held out.

    `num_sampled` = `num_accepted` + the sum of `num_rejected`, whose keys are all `REASONS`.
    `num_prompts_accepted` prompts kept a completion. Bin i of `pass_rate_histogram` counts the
    verifiable prompts of which a share in [i/10, (i + 1)/10) of the completions is correct, the
    last bin including 1. `second_opinion` says which of the answers math-verify decided.
    """

    num_sampled: int
    num_accepted: int
    num_rejected: Mapping[Reason, int]
    num_prompts: int
    num_prompts_accepted: int
    num_held_out: int
    pass_rate_histogram: tuple[int, ...]
    second_opinion: SecondOpinion


@dataclass(frozen=True, slots=True)
class AcceptedCompletions:
    """The completions to go on with, in order of tasks and sample indices, and what was dropped."""

    completions: tuple[Completion, ...]
    summary: AcceptSummary


def accept(
    tasks: Sequence[Task],
    completions: Sequence[Completion],
    config: AcceptConfig,
    tokenizer: Tokenizer,
) -> AcceptedCompletions:
    """Judge the completions of `tasks`; the order of the result is theirs, not the input's.

    Raises:
        ExportError: nothing of the train split is left.
    """
    samples = _group(tasks, completions)
    correct, second_opinion = _grade(tasks, samples, tokenizer)
    verdicts: list[_Verdicts] = []
    kept: list[Completion] = []
    num_held_out = 0
    for task in tasks:
        if task.split == _TRAIN:
            of_task = samples[task.task_id]
            verdicts.append(_judge(task, of_task, correct[task.task_id], config, tokenizer))
            kept += verdicts[-1].accepted
        else:
            held_out = [sample for sample in samples[task.task_id] if sample.sample_index == 0]
            kept += held_out
            num_held_out += len(held_out)
    summary = _summarize(verdicts, num_held_out, second_opinion)
    if verdicts and not summary.num_accepted:
        raise ExportError(
            f"none of the teacher's {summary.num_sampled} completions was accepted "
            f"({json.dumps(summary.num_rejected)}): loosen the section accept, or sample more"
        )
    return AcceptedCompletions(tuple(kept), summary)


def write_accepted(folder: Path, accepted: AcceptedCompletions) -> None:
    """Write `completions.jsonl`, as `export.teacher.sample` does, and `accept.json`."""
    write_completions(folder / ROWS_NAME, accepted.completions)
    text = json.dumps(dataclasses.asdict(accepted.summary), indent=2) + "\n"
    (folder / SUMMARY_NAME).write_text(text, encoding="utf-8")


def read_accepted(folder: Path) -> AcceptedCompletions:
    raw = json.loads((folder / SUMMARY_NAME).read_text(encoding="utf-8"))
    raw["pass_rate_histogram"] = tuple(raw["pass_rate_histogram"])
    raw["second_opinion"] = SecondOpinion(**raw["second_opinion"])
    return AcceptedCompletions(tuple(read_completions(folder / ROWS_NAME)), AcceptSummary(**raw))


def read_examples(folder: Path, split: str) -> list[Example]:
    """Return the accepted ("train") or held-out ("test") completions of the stage's folder."""
    return [row.example for row in read_accepted(folder).completions if row.split == split]


def repeated_share(token_ids: Sequence[int]) -> float:
    """Return the share of 4-grams that occurred before; 0 for fewer than four tokens.

    >>> repeated_share([5, 6, 7, 8, 9]), repeated_share([5] * 8)
    (0.0, 0.8)
    """
    ngrams = list(zip(*(token_ids[start:] for start in range(_NGRAM)), strict=False))
    return (len(ngrams) - len(set(ngrams))) / len(ngrams) if ngrams else 0.0


def foreign_share(text: str, prompt: str) -> float:
    """Return the share of letters whose script is not in the prompt; 0 for no letters.

    Latin is at home everywhere: names, units, formulas and code are written in it. So are Chinese
    characters where there is kana, as Japanese mixes them.

    >>> foreign_share("Да, yes", "Is it so?"), foreign_share("Да, yes", "Это так?")
    (0.4, 0.0)
    """
    home = set(_scripts(prompt)) | {"LATIN"}
    if "KANA" in home:
        home.add("CJK")
    scripts = _scripts(text)
    return sum(script not in home for script in scripts) / len(scripts) if scripts else 0.0


def _scripts(text: str) -> list[str]:
    """Return each letter's script: the first word of its Unicode name, compatible forms unified."""
    letters = (char for char in unicodedata.normalize("NFKC", text) if char.isalpha())
    names = (unicodedata.name(letter, "UNNAMED").split()[0] for letter in letters)
    return [_SCRIPT_OF_NAME.get(name, name) for name in names]


# --- verdicts


@dataclass(frozen=True, slots=True)
class _Verdicts:
    """Of one prompt: a reason per completion, None where it is accepted; how many were correct."""

    samples: Sequence[Completion]
    reasons: Sequence[Reason | None]
    num_correct: int
    num_checked: int

    @property
    def accepted(self) -> list[Completion]:
        pairs = zip(self.samples, self.reasons, strict=True)
        return [sample for sample, reason in pairs if reason is None]


def _group(tasks: Sequence[Task], completions: Sequence[Completion]) -> dict[str, list[Completion]]:
    """Return each task's completions by sample index."""
    samples: dict[str, list[Completion]] = {task.task_id: [] for task in tasks}
    for completion in sorted(completions, key=lambda row: row.sample_index):
        samples[completion.task_id].append(completion)
    return samples


def _grade(
    tasks: Sequence[Task], samples: Mapping[str, Sequence[Completion]], tokenizer: Tokenizer
) -> tuple[dict[str, list[bool | None]], SecondOpinion]:
    """Return by train task which of its samples are correct, None where it cannot be checked."""
    pairs = [(t, sample) for t in tasks if t.split == _TRAIN for sample in samples[t.task_id]]
    grades, second_opinion = ask_second_opinion(
        (task for task, _ in pairs),
        (_grade_one(task, sample, tokenizer) for task, sample in pairs),
    )
    correct: dict[str, list[bool | None]] = {task.task_id: [] for task in tasks}
    for (task, _), one in zip(pairs, grades, strict=True):
        correct[task.task_id].append(one.is_correct)
    return correct, second_opinion


def _grade_one(task: Task, sample: Completion, tokenizer: Tokenizer) -> Grade:
    if not task.is_verifiable:
        return Grade(None)
    is_thinking = starts_in_reasoning(sample.prompt_token_ids, tokenizer)
    text = tokenizer.decode_with_reasoning(sample.token_ids)
    return grade(task, text, starts_in_reasoning=is_thinking)


def _judge(
    task: Task,
    samples: Sequence[Completion],
    correct: Sequence[bool | None],
    config: AcceptConfig,
    tokenizer: Tokenizer,
) -> _Verdicts:
    """Judge each completion, then the prompt: its pass rate, then how many it may keep.

    The pass rate is the share of correct completions, whatever else is wrong with them.
    """
    texts = [tokenizer.decode(sample.token_ids) for sample in samples]
    num_correct, num_checked = correct.count(True), len(correct) - correct.count(None)
    is_in_band = not num_checked or (
        config.min_pass_rate <= num_correct / num_checked <= config.max_pass_rate
    )
    reasons: list[Reason | None] = []
    good_texts: set[str] = set()
    for sample, text, is_right in zip(samples, texts, correct, strict=True):
        reason = _fault(sample, text, is_right, task.text, config)
        if reason is None:
            spelled = " ".join(text.casefold().split())
            reason = _surplus(spelled, good_texts, is_in_band, config.max_per_prompt)
            good_texts.add(spelled)
        reasons.append(reason)
    return _Verdicts(samples, reasons, num_correct, num_checked)


def _fault(
    sample: Completion, text: str, is_right: bool | None, prompt: str, config: AcceptConfig
) -> Reason | None:
    """Return what is wrong with a completion on its own."""
    if config.require_correct and is_right is False:
        return "wrong_answer"
    if config.drop_truncated and sample.finish_reason == FinishReason.LENGTH.value:
        return "truncated"
    if not text.strip():
        return "empty"
    if repeated_share(sample.token_ids) > config.max_repetition:
        return "repetitive"
    if foreign_share(text, prompt) > config.max_foreign_letters:
        return "mixed_language"
    return None


def _surplus(
    text: str, good_texts: Set[str], is_in_band: bool, max_per_prompt: int
) -> Reason | None:
    """Return why a good completion is not needed, given the good ones of smaller sample index."""
    if text in good_texts:
        return "duplicate"
    if not is_in_band:
        return "outside_pass_rate_band"
    return "over_cap" if len(good_texts) >= max_per_prompt else None


def _summarize(
    verdicts: Sequence[_Verdicts], num_held_out: int, second_opinion: SecondOpinion
) -> AcceptSummary:
    counts = Counter(reason for verdict in verdicts for reason in verdict.reasons)
    histogram = [0] * NUM_PASS_RATE_BINS
    for verdict in verdicts:
        if verdict.num_checked:
            bin_index = NUM_PASS_RATE_BINS * verdict.num_correct // verdict.num_checked
            histogram[min(bin_index, NUM_PASS_RATE_BINS - 1)] += 1
    return AcceptSummary(
        num_sampled=counts.total(),
        num_accepted=counts[None],
        num_rejected={reason: counts[reason] for reason in REASONS},
        num_prompts=len(verdicts),
        num_prompts_accepted=sum(None in verdict.reasons for verdict in verdicts),
        num_held_out=num_held_out,
        pass_rate_histogram=tuple(histogram),
        second_opinion=second_opinion,
    )
