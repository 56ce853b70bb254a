"""Text to token ids and back, chats through their template.

Works on `tokenizer.json` alone (the `tokenizers` library); transformers is never imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import tokenizers

from bundle.errors import UserError, one_line
from bundle.hashing import hash_json
from estimators.answers import REASONING_BEGINS, REASONING_ENDS
from serve.errors import InvalidFieldError
from serve.text.chat_template import ChatTemplate, process_date
from serve.text.real_tokens import RealTokens
from serve.text.special_names import SpecialNames
from serve.text.tokenizer_files import DEFAULT_TEMPLATE, read_tokenizer

_TOOLS_TEMPLATE = "tool_use"
# DeepSeek's distilled models begin turns with added tokens that are not marked as special.
_TURN_TOKEN = re.compile(r"<[|\uff5c].*[|\uff5c]>")

_Render = Callable[[Sequence[tuple[str, str]]], str]


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        chat_templates: str | Mapping[str, str] | None = None,
        special_tokens: Mapping[str, Any] | None = None,
        today: date | None = None,
    ) -> None:
        """`special_tokens` are what a chat template may name, such as `bos_token`.

        `chat_templates` are one, or several by name. `today` is the date that a template may tell;
        without it the one on which this process first loaded a tokenizer.
        """
        self._tokenizer = tokenizer
        if isinstance(chat_templates, str):
            chat_templates = {DEFAULT_TEMPLATE: chat_templates}
        today = today or process_date()
        self._templates = {
            name: ChatTemplate(source, today) for name, source in (chat_templates or {}).items()
        }
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def load(cls, folder: Path, today: date | None = None) -> Tokenizer:
        """Open the tokenizer of a folder and its chat templates; see `serve.text.tokenizer_files`.

        Raises:
            UserError: a file is missing or damaged, or a template does not compile.
        """
        files = read_tokenizer(folder)
        try:
            tokenizer = cls(files.tokenizer, files.templates, files.special_tokens, today)
            # The names are looked at now, not by the first request.
            tokenizer._special_names.occur_in("")
        except (UserError, ValueError, RecursionError) as error:
            raise UserError(one_line(f"{folder}: {error}")) from None
        return tokenizer

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

    def encode_chat(
        self,
        messages: Iterable[tuple[str, str]],
        *,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Tokenize (role, content) turns through the chat template, the assistant's turn opened.

        With `continue_final_message` the ids end with the content of the last turn instead, for
        the model to go on with it. `variables` are what else the template may name, such as
        `enable_thinking`; with `tools` a template of the name "tool_use" is taken if there is one.
        The names of special tokens in a message are text: they do not end its turn.

        Raises:
            InvalidFieldError: there is no chat template, or it refuses these turns.
        """
        turns = list(messages)
        render = self._renderer(variables or {}, continue_final_message)
        text = render(turns)
        if not any(self._has_special_name(content) for _, content in turns):
            return self.encode(text, is_continuation=True)
        hidden = self._hide_names(turns, text, render)
        return tuple(self._restoring.encode(hidden, add_special_tokens=False).ids)

    def render_chat(
        self, messages: Iterable[tuple[str, str]], variables: Mapping[str, Any] | None = None
    ) -> str:
        """Return the text that `encode_chat` tokenizes; it raises the same errors."""
        return self._renderer(variables or {}, False)(list(messages))

    def _renderer(self, variables: Mapping[str, Any], continue_final_message: bool) -> _Render:
        name = DEFAULT_TEMPLATE
        if variables.get("tools") is not None and _TOOLS_TEMPLATE in self._templates:
            name = _TOOLS_TEMPLATE
        if name not in self._templates:
            others = f" but {', '.join(sorted(self._templates))}" if self._templates else ""
            raise InvalidFieldError.of(
                "messages",
                f"this model has no chat template{others}; send prompt or prompt_token_ids",
            )
        return partial(
            self._templates[name].render,
            variables={**self._special_tokens, **variables},
            continue_final_message=continue_final_message,
        )

    def _hide_names(self, turns: Sequence[tuple[str, str]], text: str, render: _Render) -> str:
        """Return the rendered text in which names of special tokens from a turn are hidden."""
        for contents, settle in self._special_names.renderings([content for _, content in turns]):
            try:
                rendered = render([(role, c) for (role, _), c in zip(turns, contents, strict=True)])
            except InvalidFieldError:
                continue
            for hidden in settle(rendered):
                if self._special_names.restore(hidden) == text:
                    return hidden
        raise InvalidFieldError.of(
            "messages",
            "the chat template changes what it writes where a message names a special token, such "
            "as <|im_end|>, so that it cannot be told from the template's own; leave the name out",
        )

    def _has_special_name(self, text: str) -> bool:
        normalizer = self._tokenizer.normalizer
        if normalizer is not None and self._are_names_normalized:
            text = f"{text}\n{normalizer.normalize_str(text)}"
        return self._special_names.occur_in(text)

    @cached_property
    def _special_added(self) -> list[tokenizers.AddedToken]:
        """The tokens whose names are text in a message: special ones and those named like them."""
        are_special = not self._tokenizer.encode_special_tokens
        added = self._tokenizer.get_added_tokens_decoder().values()
        return [t for t in added if (t.special and are_special) or _TURN_TOKEN.fullmatch(t.content)]

    @cached_property
    def _are_names_normalized(self) -> bool:
        return any(token.normalized for token in self._special_added)

    @cached_property
    def _special_names(self) -> SpecialNames:
        return SpecialNames(token.content for token in self._special_added)

    @cached_property
    def _restoring(self) -> tokenizers.Tokenizer:
        """The same tokenizer for a text with hidden names, which become text like any other.

        Special tokens are found before a text is normalized, and the names are restored by that.
        """
        state = json.loads(self._tokenizer.to_str())
        names = {token.content for token in self._special_added}
        for token in state["added_tokens"]:
            token["normalized"] &= token["content"] not in names
        before = self._special_names.restoring_normalizer()
        own = [state["normalizer"]] if state["normalizer"] else []
        state["normalizer"] = {"type": "Sequence", "normalizers": [*before, *own]}
        return tokenizers.Tokenizer.from_str(json.dumps(state))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens; special tokens have none."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def decode_with_reasoning(self, token_ids: Sequence[int]) -> str:
        """Return the text with the marks around reasoning, also where they are special tokens."""
        parts: list[list[int]] = [[]]
        marks = []
        for token_id in token_ids:
            if token_id in self._reasoning_marks:
                marks.append(self._reasoning_marks[token_id])
                parts.append([])
            else:
                parts[-1].append(token_id)
        texts = map(self.decode, parts)
        return "".join(text + mark for text, mark in zip(texts, [*marks, ""], strict=True))

    @cached_property
    def _reasoning_marks(self) -> Mapping[int, str]:
        """The marks that `decode` leaves out, by id: most models have them as text."""
        added = self._tokenizer.get_added_tokens_decoder().items()
        marks = (REASONING_BEGINS, REASONING_ENDS)
        return {i: token.content for i, token in added if token.special and token.content in marks}

    @property
    def hides_reasoning(self) -> bool:
        """Whether a mark around reasoning is a special token, which no text shows."""
        return bool(self._reasoning_marks)

    def token_text(self, token_id: int) -> str:
        """Return one token alone as text, special tokens by name; for display."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))
