"""Text to token ids and back: chat template, streaming text, stop strings.

Works on `tokenizer.json` alone (the `tokenizers` library); transformers is never imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bundle.hashing import hash_json
from serve.errors import InvalidFieldError
from serve.real_tokens import RealTokens
from serve.sequence import StopCheck

_REPLACEMENT = "\ufffd"
# Stands for the content of a turn while a template is rendered; private-use characters.
_PLACEHOLDER = re.compile("\ue0f0([0-9]+)\ue0f1")


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """`special_tokens` are what the chat template may name, such as `bos_token`."""
        self._tokenizer = tokenizer
        self._template = _compile(chat_template) if chat_template is not None else None
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json` and, where they exist, `tokenizer_config.json` and the template.

        The chat template is `chat_template.jinja`, else the one inside `tokenizer_config.json`.
        """
        config_path, template_path = (
            folder / "tokenizer_config.json",
            folder / "chat_template.jinja",
        )
        config = json.loads(config_path.read_text("utf-8")) if config_path.exists() else {}
        template = config.get("chat_template")
        if template_path.exists():
            template = template_path.read_text("utf-8")
        return cls(
            tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")),
            template,
            {key: value for key, value in config.items() if _is_special(key, value)},
        )

    @cached_property
    def hash(self) -> str:
        """SHA-256, hex, of the vocabulary (token → id): equal hashes make models comparable."""
        return hash_json(self._tokenizer.get_vocab(with_added_tokens=True))

    @cached_property
    def real_tokens(self) -> RealTokens:
        """The ids of all tokens, added ones included."""
        return RealTokens.of(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def num_tokens(self) -> int:
        """The highest token id plus one, added tokens included: from here on logits are padding.

        Ids below that no token has (holes) count, as a model has rows for them.
        """
        return self.real_tokens.num_tokens

    def encode(self, text: str, *, is_continuation: bool = False) -> tuple[int, ...]:
        """Tokenize text as it stands.

        A prompt gets the special tokens that `tokenizer.json` puts around every text (often none);
        a continuation of one never does.
        """
        return tuple(self._tokenizer.encode(text, add_special_tokens=not is_continuation).ids)

    def encode_chat(self, messages: Iterable[tuple[str, str]]) -> tuple[int, ...]:
        """Tokenize (role, content) turns through the chat template, the assistant's turn opened.

        Raises:
            InvalidFieldError: there is no chat template, or it refuses these turns.
        """
        if self._template is None:
            raise InvalidFieldError.of(
                "messages", "this model has no chat template; send prompt or prompt_token_ids"
            )
        turns = list(messages)
        if not any(name in content for _, content in turns for name in self._special_names):
            return self.encode(self._render(turns), is_continuation=True)
        # What a user writes must not end the user's turn: it is tokenized apart, as text.
        contents = [content for _, content in turns]
        text = self._render([(role, _placeholder(i)) for i, (role, _) in enumerate(turns)])
        ids: list[int] = []
        # The template's own text and the numbers of turns alternate.
        for place, part in enumerate(_PLACEHOLDER.split(text)):
            if place % 2:
                ids += self._as_text.encode(contents[int(part)], add_special_tokens=False).ids
            else:
                ids += self.encode(part, is_continuation=True)
        return tuple(ids)

    def _render(self, turns: Sequence[tuple[str, str]]) -> str:
        """Return the text of a conversation; InvalidFieldError when the template refuses it."""
        assert self._template is not None
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, **self._special_tokens
            )
        except TemplateError as error:
            raise InvalidFieldError.of(
                "messages", f"the chat template refuses them: {error}"
            ) from None

    @cached_property
    def _special_names(self) -> tuple[str, ...]:
        """The names that stand for special tokens in a text."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    @cached_property
    def _as_text(self) -> tokenizers.Tokenizer:
        """The same tokenizer, to which the names of special tokens are text like any other."""
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = True
        return copy

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens; special tokens have none."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def token_text(self, token_id: int) -> str:
        """Return one token alone as text, special tokens by name; for display."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))


def _is_special(key: str, value: Any) -> bool:
    return key.endswith("_token") and isinstance(value, str)


def _placeholder(number: int) -> str:
    return f"\ue0f0{number}\ue0f1"


def _compile(chat_template: str) -> Template:
    """Compile a template as transformers does: sandboxed, with what published templates call."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(chat_template)


def _refuse(message: str) -> None:
    raise TemplateError(message)


class CompletionText:
    """The text of a growing completion, released in pieces that never have to be taken back.

    Held back are bytes that do not make a character yet, and what may be the beginning of a stop
    string. A stop string counts where it ends within the text that the newest token added.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._max_stop_chars = max(map(len, self._stop), default=0)
        self._token_ids: list[int] = []
        self._window_start = 0  # tokens from here on are decoded together, as context
        self._num_decoded = 0  # tokens before here have their text in _held or were released
        self._held = ""
        self._num_released = 0
        self._stop_start: int | None = None  # in _held

    @property
    def num_chars(self) -> int:
        """Length of the text known so far, what is held back included."""
        return self._num_released + len(self._held)

    @property
    def is_stopped(self) -> bool:
        """Whether the newest token completed a stop string."""
        return self._stop_start is not None

    def push(self, token_ids: Iterable[int]) -> str:
        """Add tokens and return the text that became certain."""
        return "".join(self._push(token_id) for token_id in token_ids)

    def finish(self) -> str:
        """Return the rest of the text, cut before a stop string that the last token completed."""
        text = self._held
        if self._stop_start is not None:
            text = text[: self._stop_start]
        elif self._num_decoded < len(self._token_ids):
            text += self._window_text(self._num_decoded)
        self._held = ""
        return text

    def _push(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        self._stop_start = None
        delta = self._decode_delta()
        text = self._hold_back(delta) if delta and self._stop else delta
        self._num_released += len(text)
        return text

    def _hold_back(self, delta: str) -> str:
        """Return the text up to a stop string, or to what may become one; the rest is held."""
        num_known = len(self._held)
        self._held += delta
        stop_start = self._find_stop(num_known)
        release = self._safe_length() if stop_start is None else stop_start
        text, self._held = self._held[:release], self._held[release:]
        self._stop_start = None if stop_start is None else 0
        return text

    def _decode_delta(self) -> str:
        """Return the text that the tokens since the last call made, '' inside a character.

        The `DecodeStream` of tokenizers is faster by a microsecond per token, but raises where
        byte tokens that make no character change the text of those before them.
        """
        delta = self._window_text(self._num_decoded)
        if delta.endswith(_REPLACEMENT):
            return ""
        if delta:
            self._window_start, self._num_decoded = self._num_decoded, len(self._token_ids)
        return delta

    def _window_text(self, start: int) -> str:
        """Return the text of the tokens from `start` on, decoded behind those of the window."""
        before = self._tokenizer.decode(self._token_ids[self._window_start : start])
        return self._tokenizer.decode(self._token_ids[self._window_start :])[len(before) :]

    def _find_stop(self, num_known: int) -> int | None:
        """Return where the first stop string begins that ends behind `num_known` characters."""
        starts = []
        for stop in self._stop:
            start = self._held.find(stop, max(num_known - len(stop) + 1, 0))
            if start >= 0:
                starts.append(start)
        return min(starts, default=None)

    def _safe_length(self) -> int:
        """Return how much of the held text cannot be part of a stop string that is still coming."""
        for start in range(max(len(self._held) - self._max_stop_chars + 1, 0), len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stop):
                return start
        return len(self._held)


class StopChecker:
    """Builds the `StopCheck`s of one request: each follows the text of one completion."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)

    def __call__(self) -> StopCheck:
        text = CompletionText(self._tokenizer, self._stop)
        num_seen = 0

        def ends_at_stop_string(token_ids: list[int]) -> bool:
            nonlocal num_seen
            text.push(token_ids[num_seen:])
            num_seen = len(token_ids)
            return text.is_stopped

        return ends_at_stop_string
