"""Chat templates: rendered as transformers renders them, with one date, and bounded.

The reference is `transformers.utils.chat_template_utils` (4.57): the same sandbox, whitespace
control, extensions, filters and functions. Two things differ. `strftime_now` tells the date that
the caller pinned, midnight, so that a prompt is the same all through a run. And a template's loops
and its text are bounded: it comes with a model's files, and must not stop a server.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, time
from functools import cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bundle.errors import UserError
from serve.errors import InvalidFieldError

MAX_ITERATIONS = 200_000
"""Passes through the loops of a template in one rendering."""
MAX_CHARS = 1 << 26
"""Length of a rendered conversation, and of a text that a template repeats."""
_MAX_EXPONENT = 64
_MAX_REASON_CHARS = 500
_TICK = "_count_iteration"
_FINAL_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


@cache
def process_date() -> date:
    """Return the date on which this process first asked: one for all its prompts."""
    return date.today()


class ChatTemplate:
    """One template, compiled. Safe to use from several threads."""

    def __init__(self, source: str, today: date) -> None:
        """`today` is what `strftime_now` tells.

        Raises:
            UserError: it does not compile; the text has no line break.
        """
        environment = _environment(today)
        try:
            tree = environment.parse(source)
            _count_iterations(tree)
            self._template = environment.from_string(tree)
        except (jinja2.TemplateSyntaxError, RecursionError, MemoryError) as error:
            line = f" in line {error.lineno}" if hasattr(error, "lineno") else ""
            raise UserError(f"the chat template does not compile{line}: {_reason(error)}") from None

    def render(
        self,
        messages: Sequence[tuple[str, str]],
        variables: Mapping[str, Any],
        *,
        continue_final_message: bool = False,
    ) -> str:
        """Return the text of (role, content) turns.

        The assistant's turn is opened at the end; with `continue_final_message` the text ends
        where the content of the last turn does. `variables` are what else the template may name.

        Raises:
            InvalidFieldError: the template refuses these messages, fails on them, or leaves out
                the message that is to be continued.
        """
        turns = [{"role": role, "content": content} for role, content in messages]
        if continue_final_message:
            turns[-1]["content"] += _FINAL_TAG
        known = {"tools": None, "documents": None, **variables}
        known["add_generation_prompt"] = not continue_final_message
        counter = _Counter()
        try:
            pieces = self._template.generate(messages=turns, **known, **{_TICK: counter.tick})
            text = _join(pieces)
        except Exception as error:  # it is the template's own program: anything may come
            raise _refusal(f"the chat template refuses them: {_reason(error)}") from None
        return _cut(text, messages[-1][1]) if continue_final_message else text


def _cut(text: str, content: str) -> str:
    """Return the text up to the end of the last message, where the tag stands."""
    tag = _FINAL_TAG.strip()
    if content.strip() not in text or tag not in text:
        raise _refusal(
            "continue_final_message: the chat template leaves out the final message, or a part of "
            "it, so it cannot be continued"
        )
    start = text.rindex(tag)
    is_spacing_kept = text.startswith(_FINAL_TAG, start)
    return text[:start] if is_spacing_kept else text[:start].rstrip()


def _refusal(reason: str) -> InvalidFieldError:
    return InvalidFieldError.of("messages", reason)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, jinja2.TemplateError):
        text = f"{type(error).__name__}: {text}"
    return text[:_MAX_REASON_CHARS]


# -- the environment ------------------------------------------------------------------------------


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers, in which no text and no power grows without bound."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and abs(right) > _MAX_EXPONENT:
            raise OverflowError(f"exponent {right} is above {_MAX_EXPONENT}")
        for value, count in ((left, right), (right, left)):
            if operator == "*" and isinstance(value, str | list | tuple):
                _check_length(len(value) * count)
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}`: in transformers it marks what an assistant wrote; the text stays."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_keep")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _keep(self, caller: Any) -> Any:
        return caller()


def _environment(today: date) -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = datetime.combine(today, time()).strftime
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


# -- bounds ---------------------------------------------------------------------------------------


class _Counter:
    def __init__(self) -> None:
        self._count = 0

    def tick(self) -> None:
        self._count += 1
        if self._count > MAX_ITERATIONS:
            raise OverflowError(f"its loops pass more than {MAX_ITERATIONS} times")


def _count_iterations(tree: nodes.Template) -> None:
    """Let every pass through a loop call the counter of its rendering."""
    for loop in tree.find_all(nodes.For):
        tick = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
        loop.body.insert(0, nodes.ExprStmt(tick).set_lineno(loop.lineno))


def _check_length(num_chars: int) -> None:
    if num_chars > MAX_CHARS:
        raise OverflowError(f"its text has more than {MAX_CHARS} characters")


def _join(pieces: Iterable[str]) -> str:
    known, num_chars = [], 0
    for piece in pieces:
        num_chars += len(piece)
        _check_length(num_chars)
        known.append(piece)
    return "".join(known)
