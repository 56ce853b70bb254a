"""The built-in task set: short prompts, some with an answer that can be checked.

Prompts are made from templates and the words in `data/tasks.yaml`, the same ones for the same seed
on every machine. Every prompt has a content key (the topic asked about, the operands of a sum),
and the key alone decides its split: near duplicates never straddle, whatever the seed.

The verifiable families are worded so that a 135M model is neither always right nor always wrong.
SmolLM2-135M-Instruct (Q4_1 as bfloat16, greedy, 40 tokens, 24 prompts each, 2026-11-22) is right
in: add 46 %, multiply 58 %, add_story 67 %, larger 50 %, smaller 46 %, number_fact 25 %,
capital 67 %, opposite 50 %, plural 67 %. Tried and left out, below 20 %: subtraction, sequences,
unit conversion, counting letters or words, multiple choice (it picks the first letter), bare words.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import yaml

Split = Literal["train", "validation", "test"]
Turn = tuple[str, str]
TEST_SHARE = 0.10
VALIDATION_SHARE = 0.05
MAX_DRAFTS_PER_TASK = 20  # a family that repeats itself ends with fewer tasks
_WORDS_AND_SYMBOLS = re.compile(r"""\d+\.\d+|\w+|[^\w\s.,:;!?'"‘’“”]""")
_WORDS_AND_MARKS = re.compile(r"\d+\.\d+|\w+|[^\w\s]")
_NAME = re.compile(r"(?![AaIi])\w")
_SAME_MARKS = str.maketrans("‘’“”", "''\"\"")


@dataclass(frozen=True, slots=True)
class GymEntry:
    """Where a task comes from in reasoning-gym: enough to generate it again and score answers.

    `options` is the JSON of what `create_dataset` is given besides size and seed.
    """

    dataset: str
    size: int
    seed: int
    options: str
    index: int


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt to put to a model as a user message, behind the `turns` that came before it.

    A turn is (role, content).
    `answer` is canonical under `estimators.canonical.canonicalise`; `answer_format` names the
    extractor that finds the answer in a completion, "none" for a free-form prompt. With a
    `gym_entry` the dataset's own scorer judges: `export.teacher.grading.grade` asks the right one.
    """

    task_id: str
    prompt: str
    answer: str | None
    answer_format: str
    family: str
    split: Split
    gym_entry: GymEntry | None = None
    turns: tuple[Turn, ...] = ()

    @property
    def messages(self) -> tuple[Turn, ...]:
        """All turns of the conversation, the user's last."""
        return (*self.turns, ("user", self.prompt))

    @property
    def text(self) -> str:
        """The contents of all turns, a line each."""
        return "\n".join(content for _, content in self.messages)

    @property
    def is_verifiable(self) -> bool:
        return self.answer is not None or self.gym_entry is not None


@dataclass(frozen=True, slots=True)
class _Draft:
    prompt: str
    key: str
    answer: str | None = None
    answer_format: str = "none"


Family = Callable[[random.Random], Iterator[_Draft]]


def builtin_tasks(seed: int = 0) -> list[Task]:
    """Return about 2,000 tasks in a random order that the seed decides; no prompt appears twice."""
    families = {**_verifiable_families(), **_free_families()}
    tasks: dict[str, Task] = {}
    for family, (make, max_tasks) in families.items():
        limit = len(tasks) + max_tasks
        drafts = make(random.Random(f"{seed}/{family}"))
        for draft in itertools.islice(drafts, MAX_DRAFTS_PER_TASK * max_tasks):
            task = _to_task(family, draft)
            tasks.setdefault(task.task_id, task)
            if len(tasks) == limit:
                break
    shuffled = list(tasks.values())
    random.Random(f"{seed}/order").shuffle(shuffled)
    return shuffled


def normalise_prompt(prompt: str) -> str:
    """Return the prompt without case, spacing and the marks of a sentence: equal if so read.

    >>> normalise_prompt("What is  2 + 3?") == normalise_prompt("what is 2+3")
    True
    >>> normalise_prompt("(1 + 2) * 3") == normalise_prompt("1 + (2 * 3)")
    False
    """
    return " ".join(_WORDS_AND_SYMBOLS.findall(prompt.casefold()))


def repeat_key(text: str) -> str:
    """Return the text without what does not change its meaning: prompts of equal keys repeat.

    Those are spacing, the case of words, and the marks at its end. A letter alone, but for the
    words "a" and "I", keeps its case and every mark inside stays: they are names and signs of
    mathematics. `normalise_prompt` is coarser: what is alike by it shares a split, and may be
    another question.

    >>> repeat_key("What is  f(2)?") == repeat_key("what is f( 2 )")
    True
    >>> len({repeat_key(text) for text in ("f(2)", "f'(2)", "F(2)", "5!", "5")})
    5
    """
    words = _WORDS_AND_MARKS.findall(text.translate(_SAME_MARKS))
    while words and words[-1] in (".", "?"):
        words.pop()
    return " ".join(word if _NAME.fullmatch(word) else word.casefold() for word in words)


def prompt_id(prompt: str) -> str:
    """Return 16 hex digits that stand for the normalised prompt."""
    return hashlib.sha256(normalise_prompt(prompt).encode()).hexdigest()[:16]


def exact_id(text: str) -> str:
    """Return 16 hex digits for a prompt beside which lies another of the same `prompt_id`."""
    return hashlib.sha256(f"text:{text}".encode()).hexdigest()[:16]


def split_of(key: str) -> Split:
    """Return the split that a content key belongs to, by its hash alone."""
    position = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    if position < TEST_SHARE:
        return "test"
    return "validation" if position < TEST_SHARE + VALIDATION_SHARE else "train"


def _to_task(family: str, draft: _Draft) -> Task:
    return Task(
        task_id=prompt_id(draft.prompt),
        prompt=draft.prompt,
        answer=draft.answer,
        answer_format=draft.answer_format,
        family=family,
        split=split_of(draft.key),
    )


@functools.cache
def _words() -> dict[str, Any]:
    text = resources.files("export").joinpath("data/tasks.yaml").read_text(encoding="utf-8")
    words: dict[str, Any] = yaml.safe_load(text)
    return words


# --- free-form: templates x slots


def _free_families() -> dict[str, tuple[Family, int]]:
    return {
        name: (functools.partial(_fill_templates, name), len(spec["slots"]) * spec["per_slot"])
        for name, spec in _words()["free"].items()
    }


def _fill_templates(name: str, rng: random.Random) -> Iterator[_Draft]:
    spec = _words()["free"][name]
    for slot in spec["slots"]:
        fields = slot if isinstance(slot, list) else [slot]
        for template in rng.sample(spec["templates"], spec["per_slot"]):
            prompt = template.format(*fields)
            yield _Draft(prompt[0].upper() + prompt[1:], key=_content_key(fields[0]))


def _content_key(words: str) -> str:
    """The same for "the moon" in a poem and "a moon" in a description."""
    return re.sub(r"^(a|an|the) ", "", words.casefold())


# --- verifiable: drafts without end, or one per entry and wording of a word list


def _verifiable_families() -> dict[str, tuple[Family, int]]:
    return {
        "add": (_add, 110),
        "multiply": (_multiply, 110),
        "add_story": (_add_story, 120),
        "larger": (functools.partial(_extreme, "larger", max), 60),
        "smaller": (functools.partial(_extreme, "smaller", min), 80),
        "number_fact": (_number_fact, 60),
        "capital": (functools.partial(_sentence, "capitals", "capital"), 120),
        "opposite": (functools.partial(_sentence, "opposites", "opposite"), 100),
        "plural": (functools.partial(_sentence, "plurals", "plural"), 60),
    }


def _number(question: str, key: str, answer: int) -> _Draft:
    prompt = f"{question} Reply with the number only."
    return _Draft(prompt, key, str(answer), "last_number")


def _operands(rng: random.Random, low: int, high: int) -> Iterator[tuple[int, int]]:
    while True:
        yield rng.randint(low, high), rng.randint(low, high)


def _add(rng: random.Random) -> Iterator[_Draft]:
    wordings = ["What is {} + {}?", "What is {} plus {}?", "Add {} and {}."]
    for a, b in _operands(rng, 2, 20):
        yield _number(rng.choice(wordings).format(a, b), f"{min(a, b)}+{max(a, b)}", a + b)


def _multiply(rng: random.Random) -> Iterator[_Draft]:
    wordings = ["What is {} times {}?", "What is {} * {}?", "Multiply {} by {}."]
    for a, b in _operands(rng, 2, 12):
        yield _number(rng.choice(wordings).format(a, b), f"{min(a, b)}*{max(a, b)}", a * b)


def _add_story(rng: random.Random) -> Iterator[_Draft]:
    wordings = [
        "{who} has {a} {things} and gets {b} more. How many {things} does {who} have now?",
        "There are {a} {things} in a box. {who} adds {b} more. How many {things} are in the box?",
        "{who} buys {a} {things} on Monday and {b} on Tuesday. How many {things} is that?",
    ]
    for a, b in _operands(rng, 2, 12):
        names = {"who": rng.choice(_words()["people"]), "things": rng.choice(_words()["things"])}
        question = rng.choice(wordings).format(a=a, b=b, **names)
        yield _number(question, f"{min(a, b)}+{max(a, b)}", a + b)


def _extreme(word: str, pick: Callable[[int, int], int], rng: random.Random) -> Iterator[_Draft]:
    wordings = ["Which number is {}, {} or {}?", "Which number is {}: {} or {}?"]
    for a, b in _operands(rng, 10, 99):
        if a != b:
            question = rng.choice(wordings).format(word, a, b)
            yield _number(question, f"{min(a, b)}<{max(a, b)}", pick(a, b))


def _number_fact(rng: random.Random) -> Iterator[_Draft]:
    for question, answer in _words()["numbers"]:
        yield _number(f"{question}?", question, answer)


def _sentence(words: str, relation: str, rng: random.Random) -> Iterator[_Draft]:
    """A small model answers in a sentence whatever it is told: so the whole sentence is checked."""
    wordings = [
        "What is the {} of {}? Answer in one short sentence.",
        "Complete this sentence: The {} of {} is",
    ]
    for wording in rng.sample(wordings, len(wordings)):
        for word, answer in _words()[words]:
            sentence = f"the {relation} of {word} is {answer}".casefold()
            prompt = wording.format(relation, word)
            yield _Draft(prompt, f"{relation} {word}", sentence, "final_line")
