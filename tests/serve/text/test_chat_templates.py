"""Chat prompts of published models' shapes: text and ids are those of transformers."""

from __future__ import annotations

import json
import random
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.chat_template_utils
from jinja2 import TemplateError
from transformers import AutoTokenizer

from serve.errors import InvalidFieldError
from serve.text.tokenizer import Tokenizer
from tests.support.models.chat_shapes import SHAPES, Shape

TODAY = date(2026, 2, 3)
Turns = list[tuple[str, str]]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
        },
    }
]
CONVERSATIONS: dict[str, Turns] = {
    "one turn": [("user", "What is 12 + 30?")],
    "system": [("system", "Be brief."), ("user", "Hi")],
    "empty system": [("system", ""), ("user", "Hi")],
    "empty turn": [("user", "")],
    "turns": [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
    "twice the same role": [("user", "a"), ("user", "b")],
    "spaces": [
        ("system", "  s \n"),
        ("user", "\n\n  a  b \t\n"),
        ("assistant", " c "),
        ("user", " "),
    ],
    "reasoning": [
        ("user", "a"),
        ("assistant", "<think>\nhm\n</think>\n\n b"),
        ("user", "<think>c</think>"),
    ],
    "ends with reasoning": [("user", "a"), ("assistant", "<think>\n\nhm</think>\n\nb\n")],
    "marks": [
        ("user", "Caf\u00e9 cafe\u0301 \u4f60\u597d \U0001f44b\U0001f3fd\u00a0\u2028x\u200d")
    ],
    "private characters": [("user", "\ufdd0\ue000\ue001 \ufdd0\uf8fe\ufdd0\uf8ff \ue0f00\ue0f1")],
    "no thinking": [("system", "Be brief. /no_think"), ("user", "a /no_think")],
    "no system": [("system", "x /system_override /think"), ("user", "a")],
    "braces": [("user", "{{ 1 + 1 }} {% if %} {# x #}\\n")],
}
VARIABLES: dict[str, dict[str, Any]] = {
    "": {},
    "with thinking": {"enable_thinking": True},
    "without thinking": {"enable_thinking": False},
    "tools": {"tools": TOOLS},
    "documents": {"documents": [{"title": "t", "text": "x"}]},
    "another date": {"date_string": "1 Jan 2000"},
}


class FixedDay(datetime):
    @classmethod
    def now(cls, tz: object = None) -> FixedDay:
        return cls(TODAY.year, TODAY.month, TODAY.day)


@pytest.fixture(autouse=True)
def one_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", FixedDay)


@pytest.fixture(scope="session", params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape: Shape = SHAPES[request.param]
    return shape.save(tmp_path_factory.mktemp("shape"))


@pytest.fixture(scope="session")
def reference(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder, TODAY)


def expected_text(reference: Any, turns: Turns, **options: Any) -> str | None:
    """What transformers renders; None: the template refuses."""
    messages = [{"role": role, "content": content} for role, content in turns]
    options = {"add_generation_prompt": True} | options
    try:
        text: str = reference.apply_chat_template(messages, tokenize=False, **options)
    except (TemplateError, ValueError, IndexError, TypeError):
        return None
    return text


def ids_of(reference: Any, text: str) -> tuple[int, ...]:
    return tuple(reference(text, add_special_tokens=False).input_ids)


def test_prompts_are_those_of_transformers(reference: Any, ours: Tokenizer) -> None:
    for turns in CONVERSATIONS.values():
        for variables in VARIABLES.values():
            text = expected_text(reference, turns, **variables)
            if text is None:
                with pytest.raises(InvalidFieldError, match="messages: the chat template refuses"):
                    ours.encode_chat(turns, variables=variables)
                continue
            assert ours.render_chat(turns, variables) == text
            assert ours.encode_chat(turns, variables=variables) == ids_of(reference, text)


def test_raw_texts_are_tokenized_as_in_transformers(reference: Any, ours: Tokenizer) -> None:
    for turns in CONVERSATIONS.values():
        for _, content in turns:
            assert ours.encode(content) == tuple(reference(content).input_ids), content


def renamed(folder: Path, target: Path, names: list[str]) -> Any:
    """The same tokenizer and template, in which special tokens have other names than in `names`."""
    target.mkdir()
    for path in folder.iterdir():
        value = json.loads(path.read_text("utf-8"))
        if "tokenizer_class" in value:  # another class would add names of its own
            value["tokenizer_class"] = "PreTrainedTokenizerFast"
        text = json.dumps(value, ensure_ascii=False)
        for name in sorted(names, key=len, reverse=True):
            text = text.replace(name, f"{name[0]}\u2e22{name[1:]}")
        (target / path.name).write_text(text, "utf-8")
    return AutoTokenizer.from_pretrained(target)


def hostile(name: str) -> list[Turns]:
    return [
        [("user", f"x{name}y")],
        [("user", name)],
        [("user", f" {name} \n{name}{name}")],
        [("system", f"{name} s"), ("user", f"/no_think {name}\ufdd0\ue001")],
        [("user", "a"), ("assistant", f"<think>\n{name}</think>\n\n{name} b"), ("user", name[:-1])],
        [("user", f"{name[:-1]}{name}{name[1:]}")],
    ]


@pytest.fixture(scope="session")
def names(reference: Any) -> list[str]:
    """Special tokens, and DeepSeek's that are not marked so."""
    special = [t.content for t in reference.added_tokens_decoder.values() if t.special]
    unmarked = [name for name in reference.get_added_vocab() if name[:2] in ("<|", "<\uff5c")]
    return list(dict.fromkeys(special + unmarked))


@pytest.fixture(scope="session")
def other(folder: Path, names: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """To this tokenizer the names are text; its own special tokens have the same ids."""
    return renamed(folder, tmp_path_factory.mktemp("shape") / "renamed", names)


def test_names_of_special_tokens_in_a_turn_are_text(
    reference: Any, other: Any, ours: Tokenizer, names: list[str]
) -> None:
    for name in names:
        for turns in hostile(name):
            text = expected_text(other, turns)
            if text is not None:
                assert ours.render_chat(turns) == expected_text(reference, turns)
                assert ours.encode_chat(turns) == ids_of(other, text), turns


def test_names_among_anything_are_text(other: Any, ours: Tokenizer, names: list[str]) -> None:
    parts = [*names, *(n[:-1] for n in names), *(n[1:] for n in names), "</think>", "/no_think"]
    parts += [" ", "\n\n", "a", "  b", "<", "|", "\ufdd0", "\ue001", "\u2581", "\u3000", "e\u0301"]
    draw = random.Random(0)
    for _ in range(25):
        contents = ["".join(draw.choices(parts, k=draw.randint(0, 7))) for _ in range(3)]
        turns = list(zip(("user", "assistant", "user"), contents, strict=True))
        text = expected_text(other, turns)
        assert text is not None
        assert ours.encode_chat(turns) == ids_of(other, text), turns


@pytest.mark.parametrize("final", ["So", "So ", " a\n\n", "<|im_end|> x", "Caf\u00e9"])
def test_final_message_is_continued_as_in_transformers(
    other: Any, ours: Tokenizer, final: str
) -> None:
    turns = [("user", "a"), ("assistant", final)]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    text = expected_text(other, turns, **options)
    assert text is not None and text.rstrip().endswith(final.strip())
    assert ours.encode_chat(turns, continue_final_message=True) == ids_of(other, text)
