"""TaskRows of a user's file as tasks: JSON lines in the forms that data sets come in.

    prompt       prompt: text, or a list of messages
    messages     a chat: role and content; an assistant's turn at its end is left out
    instruction  instruction and, where there is one, input below it (Alpaca)
    question     question or problem; of an answer with "#### 18" the part behind (GSM8K, MATH)

Every form may have `answer` (text or number), `answer_format`, `id`, `family` and `split`. The
teacher answers each prompt itself: completions of a file (`completion`, `output`) are not used.
TaskRows without a split are divided by the hash of their prompt.
"""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from bundle.errors import one_line
from estimators.answers import ANSWER_FORMATS, extract
from estimators.canonical import canonicalise, is_same
from export.run.errors import ExportError
from export.teacher.chats import Number, read_chat
from export.teacher.tasks import Split, Task, Turn, normalise_prompt, prompt_id, split_of

Form = Literal["auto", "prompt", "messages", "instruction", "question"]

_COMMON = ("answer", "answer_format", "id", "family", "split")
# Form -> the columns of its own; the first one that a row has is what the form is known by.
_OWN = {
    "prompt": ("prompt",),
    "messages": ("messages",),
    "instruction": ("instruction", "input"),
    "question": ("question", "problem"),
}
_KNOWN_BY = {"prompt": "prompt", "messages": "messages", "instruction": "instruction",
             "question": "question", "problem": "question"}  # fmt: skip
_MARK = "####"
_MAX_SHOWN = 50
_TYPO_LIKENESS = 0.83


class TaskRowsError(ExportError):
    """TaskRows are faulty: a line for each, with file and line."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        more = [f"and {len(faults) - _MAX_SHOWN} more faults"] if len(faults) > _MAX_SHOWN else []
        super().__init__("\n".join([*faults[:_MAX_SHOWN], *more]))


@dataclass(frozen=True, slots=True)
class SourceTask:
    """A task, where it stands ("rows.jsonl:7", if in a file), and what its row gave itself."""

    task: Task
    place: str = ""
    has_id: bool = False
    has_split: bool = False


@dataclass(frozen=True, slots=True)
class TaskRows:
    """What a file holds: tasks, `faults` with their places, and `notes` for people."""

    tasks: tuple[SourceTask, ...]
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_rows(path: Path, form: Form = "auto") -> TaskRows:
    """Read a file, blank lines left out. TaskRowsError when it is not one of JSON lines."""
    tasks, faults, unused = [], [], dict[str, None]()
    for number, line in _lines(path):
        row = _Row(f"{path}:{number}", form)
        task = row.read(line)
        faults += [f"{row.place}: {fault}" for fault in row.faults]
        unused |= dict.fromkeys(row.unused)
        if task is not None and not row.faults:
            tasks.append(task)
    if not tasks and not faults:
        raise TaskRowsError([f"{path}:1: the file is empty; give one JSON object per line"])
    return TaskRows(tuple(tasks), tuple(_once(faults)), tuple(_note(path, unused)))


def _note(path: Path, unused: Iterable[str]) -> Iterator[str]:
    if columns := ", ".join(map(one_line, unused)):
        yield f"{path}: not used are {columns}; the teacher answers every prompt itself"


def _once(faults: Iterable[str]) -> Iterator[str]:
    """Leave out what is said of the first row and holds for all: that no form fits."""
    is_told = False
    for fault in faults:
        is_form = _NO_FORM in fault
        if not (is_form and is_told):
            yield fault
        is_told = is_told or is_form


_NO_FORM = "fit no form"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TaskRowsError([f"{path} cannot be read: {error.strerror}"]) from None
    if data.startswith(b"PAR1"):
        raise TaskRowsError([f"{path} is parquet; give JSON lines, one object per line"])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise TaskRowsError([f"{path}:{number}: not UTF-8: {error.reason}"]) from None
    # Not splitlines: a JSON string may hold U+2028 and its like as they are.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if lines and lines[0][1].strip() in ("[", "{"):
        number, first = lines[0]
        kind = "array" if first.strip() == "[" else "object"
        raise TaskRowsError(
            [f"{path}:{number}: a JSON {kind} over several lines; give one object per line"]
        )
    yield from lines


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _is_text(raw: Any) -> bool:
    """Say whether all strings of a JSON value are Unicode: an escape may be half of a pair."""
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


class _Row:
    """One line, and what is wrong with it."""

    def __init__(self, place: str, form: Form) -> None:
        self.place = place
        self.faults: list[str] = []
        self.unused: list[str] = []
        self._form: str = form
        self._raw: dict[str, Any] = {}

    def read(self, line: str) -> SourceTask | None:
        """Return the row's task, None where a fault leaves none."""
        if not self._parse(line) or not self._choose_form():
            return None
        self._check_columns()
        messages = self._messages()
        answer = self._answer()
        answer_format = self._answer_format(answer)
        split = self._split()
        task_id, family = self._text("id"), self._text("family")
        if messages is None or self.faults:
            return None
        *turns, (_, prompt) = messages
        text = "\n".join(content for _, content in messages)
        task = Task(
            task_id=task_id or prompt_id(text),
            prompt=prompt,
            answer=canonicalise(answer),
            answer_format=answer_format,
            family=family or "jsonl",
            split=split or split_of(normalise_prompt(text)),
            turns=tuple(turns),
        )
        return SourceTask(task, self.place, task_id is not None, split is not None)

    def _fault(self, text: str) -> None:
        self.faults.append(text)

    def _parse(self, line: str) -> bool:
        try:
            raw = json.loads(
                line,
                object_pairs_hook=self._object,
                parse_int=Number,
                parse_float=Number,
                parse_constant=_refuse_constant,
            )
        except RecursionError:
            self._fault("the line: nested too deeply")
        except ValueError as error:
            self._fault(f"the line: not JSON: {error}")
        else:
            if not _is_text(raw):
                self._fault("the line: half of a surrogate pair in it is no text")
            elif isinstance(raw, dict):
                self._raw = raw
            else:
                self._fault(f"the line: {reprlib.repr(raw)} is no JSON object")
        return not self.faults

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self._fault(f"{one_line(twice)}: is given twice")
        return values

    def _choose_form(self) -> bool:
        """Choose by the columns where the recipe does not say; a column that is null is none."""
        given = [name for name in _KNOWN_BY if self._raw.get(name) is not None]
        forms = list(dict.fromkeys(_KNOWN_BY[name] for name in given))
        if self._form != "auto":
            return True
        if len(forms) == 1:
            self._form = forms[0]
            return True
        found = ", ".join(map(one_line, self._raw)) or "none"
        if not forms and not any(name in self._raw for name in _KNOWN_BY):
            self._fault(
                f"its columns ({found}) {_NO_FORM}: give prompt; messages; instruction with "
                "input; or question (or problem) with answer"
            )
        elif not forms:
            name = next(name for name in self._raw if name in _KNOWN_BY)
            self._fault(f"{name}: is null")
        else:
            self._fault(f"has {' and '.join(given)}: say in the recipe which `format` it is")
        return False

    def _check_columns(self) -> None:
        known = (*_OWN[self._form], *_COMMON)
        missing = [name for name in known if name not in self._raw]
        for name in self._raw:
            if name in known:
                continue
            close = difflib.get_close_matches(name, missing, n=1, cutoff=_TYPO_LIKENESS)
            if close and name != f"{close[0]}s":
                self._fault(f"{one_line(name)}: is no column; did you mean {close[0]}?")
            else:
                self.unused.append(name)

    def _text(self, name: str, *, is_required: bool = False) -> str | None:
        """Return a column's text; numbers are text as they are spelled, unless it is required."""
        value = self._raw.get(name)
        if isinstance(value, bool):
            value = str(value).lower()
        if value is None and not is_required:
            return None
        if not isinstance(value, str) or (is_required and isinstance(value, Number)):
            found = "missing" if value is None else f"{reprlib.repr(value)}, not text"
            self._fault(f"{name}: is {found}")
        elif not value.strip():
            self._fault(f"{name}: is empty")
        else:
            return str(value)
        return None

    # -- the prompt

    def _messages(self) -> list[Turn] | None:
        if self._form == "messages" or isinstance(self._raw.get("prompt"), list):
            name = "messages" if self._form == "messages" else "prompt"
            return self._chat(name, self._raw.get(name))
        name = next((n for n in _OWN[self._form] if n in self._raw), _OWN[self._form][0])
        prompt = self._text("instruction" if self._form == "instruction" else name,
                            is_required=True)  # fmt: skip
        if prompt is None:
            return None
        below = self._raw.get("input") if self._form == "instruction" else None
        if below is not None and (not isinstance(below, str) or isinstance(below, Number)):
            self._fault(f"input: is {reprlib.repr(below)}, not text")
        elif below and below.strip():
            prompt = f"{prompt}\n\n{below}"
        return [("user", prompt)]

    def _chat(self, name: str, value: Any) -> list[Turn] | None:
        try:
            chat = read_chat(name, value)
        except ValueError as error:
            self._fault(str(error))
            return None
        if chat.has_answer:
            self.unused.append("the last assistant's turn")
        return list(chat.turns)

    # -- the answer

    def _answer(self) -> str | None:
        answer = self._text("answer")
        if answer is not None and self._form == "question" and _MARK in answer:
            return answer.rpartition(_MARK)[2].strip()
        return answer

    def _answer_format(self, answer: str | None) -> str:
        given = self._text("answer_format")
        if given is not None and given not in ANSWER_FORMATS:
            valid = ", ".join(ANSWER_FORMATS)
            self._fault(f"answer_format: {reprlib.repr(given)} is unknown; valid: {valid}")
            return "none"
        answer_format = given or self._default_format(answer)
        self._check_answer(answer, answer_format)
        return answer_format

    def _default_format(self, answer: str | None) -> str:
        if answer is None:
            return "none"
        is_marked = _MARK in str(self._raw["answer"]) and self._form == "question"
        is_number = extract(answer, "last_number") == answer
        return "last_number" if is_marked and is_number else "final_line"

    def _check_answer(self, answer: str | None, answer_format: str) -> None:
        """Refuse an answer that no completion could be found to give."""
        if answer is None:
            if answer_format != "none" and self._raw.get("answer") is None:
                self._fault(f"answer: is missing; answer_format {answer_format!r} needs one")
            return
        text = f"\\boxed{{{answer}}}" if answer_format == "boxed" else answer
        found = canonicalise(extract(text, answer_format))
        if found is None or not is_same(found, canonicalise(answer) or ""):
            self._fault(
                f"answer: {reprlib.repr(answer)} can never be found by answer_format "
                f"{answer_format!r}, which reads it as {reprlib.repr(found)}"
            )

    def _split(self) -> Split | None:
        split = self._raw.get("split")
        valid = get_args(Split)
        if split is not None and split not in valid:
            self._fault(f"split: is {reprlib.repr(split)}; valid: {', '.join(valid)}")
        return split
