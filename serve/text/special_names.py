"""Names of special tokens inside a message: told apart from those that a chat template writes.

What a user writes must not end the user's turn. A template is rendered with the real messages, and
a second time with every such name disguised; where both texts agree, the second one says which
names came from a message. `restoring_normalizer` undoes the disguise inside the tokenizer, behind
the search for special tokens, so that the names are tokenized as text, in their surroundings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, product
from typing import Any

# A noncharacter, which no text should hold (Unicode 16, section 23.7), begins every code; a
# private-use character says what it stands for.
_ESCAPE = "\ufdd0"
_FIRST_CODE, _MAX_CODES = 0xE000, 6000
_OPEN, _CLOSE = f"{_ESCAPE}\uf8fe", f"{_ESCAPE}\uf8ff"
# What a template may strip before and behind a name at which it splits. A run of spaces is searched
# once, from its beginning: from each of its places, a message of spaces would take hours.
_BEFORE = ("", r"(?<!\n)\n*", r"(?<!\s)\s*")
_BEHIND = ("", r"\n*", r"\s*")

_Settle = Callable[[str], Iterator[str]]


def _any_of(names: Sequence[str]) -> str:
    """Return a pattern for any of the sorted names, the longest first.

    It is a tree of their beginnings: a tokenizer has thousands of names that begin alike, and each
    `<` of a message would be compared with all of them.

    >>> _any_of(["<s>", "<s>a", "<t>", "[x]"])
    '(?:<(?:s>(?:a)?|t>)|\\\\[x\\\\])'
    """
    ends_here, names = not names[0], [name for name in names if name]
    branches = []
    for _, group in groupby(names, key=lambda name: name[0]):
        alike = list(group)
        begin = os.path.commonprefix(alike)  # noqa: RUF071 -- of texts, not of paths
        rests = [name[len(begin) :] for name in alike]
        branches.append(re.escape(begin) + (_any_of(rests) if len(rests) > 1 else ""))
    return f"(?:{'|'.join(branches)})" + "?" * ends_here


class SpecialNames:
    """The names of a tokenizer's special tokens, and how they are disguised in a text."""

    def __init__(self, names: Iterable[str]) -> None:
        """`names` that are empty are left out.

        Raises:
            ValueError: they begin with more than 6,000 different characters, or too many of them
                are the beginnings of others.
        """
        known = sorted(set(filter(None, names)))
        self._any = re.compile(_any_of(known) if known else r"(?!)")
        firsts = [_ESCAPE, *sorted({name[0] for name in known} - {_ESCAPE})]
        if len(firsts) > _MAX_CODES:
            raise ValueError(f"special tokens begin with {len(firsts)} different characters")
        self._codes = {c: _ESCAPE + chr(_FIRST_CODE + i) for i, c in enumerate(firsts)}
        self._chars = {code: char for char, code in self._codes.items()}
        begins = re.escape(_ESCAPE) + f"|(?={self._any.pattern})."
        self._hidden = re.compile(begins, re.DOTALL)

    def occur_in(self, text: str) -> bool:
        return self._any.search(text) is not None

    def hide(self, text: str) -> str:
        """Replace the first character of every name; the text then holds none.

        >>> names = SpecialNames(["<s>"])
        >>> names.occur_in(names.hide("a<s>")), names.restore(names.hide("a<s>"))
        (False, 'a<s>')
        """
        return self._hidden.sub(lambda match: self._codes[match[0]], text)

    def restore(self, text: str) -> str:
        """Undo `hide`."""
        return re.sub(f"{_ESCAPE}.", lambda m: self._chars.get(m[0], m[0]), text, flags=re.DOTALL)

    def renderings(self, messages: Sequence[str]) -> Iterator[tuple[list[str], _Settle]]:
        """Yield the messages disguised in one way after another.

        With each comes a function from what the template made of them to the texts that this may
        mean, names hidden. First every name is hidden: enough unless the template looks for one.
        Then names stay whole between two marks: a template may find them and split there.
        """
        yield [self.hide(message) for message in messages], lambda rendered: iter([rendered])
        yield [self._mark(message) for message in messages], self._settle

    def restoring_normalizer(self) -> list[dict[str, Any]]:
        """Return the steps that undo `hide`, in the form of tokenizer.json."""
        # The escape itself comes last: restored before, it could make a code with what follows.
        return [
            {"type": "Replace", "pattern": {"String": code}, "content": char}
            for char, code in reversed(self._codes.items())
        ]

    def _mark(self, text: str) -> str:
        pieces, end = [], 0
        for start, stop in self._spans(text):
            pieces += [text[end:start].replace(_ESCAPE, self._codes[_ESCAPE])]
            pieces += [_OPEN, text[start:stop], _CLOSE]
            end = stop
        return "".join(pieces) + text[end:].replace(_ESCAPE, self._codes[_ESCAPE])

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Return where names lie; names that overlap make one span."""
        spans: list[tuple[int, int]] = []
        position = 0
        while match := self._any.search(text, position):
            start, stop = match.span()
            if spans and start < spans[-1][1]:
                start, stop = spans[-1][0], max(stop, spans.pop()[1])
            spans.append((start, stop))
            position = match.start() + 1
        return spans

    def _settle(self, rendered: str) -> Iterator[str]:
        whole = re.compile(f"{_OPEN}((?:(?!{_ESCAPE}).)*){_CLOSE}", re.DOTALL)
        hidden = whole.sub(lambda match: self.hide(match[1]), rendered)
        # Marks that are left stood beside a name at which the template split or which it replaced.
        for before, behind in product(_BEFORE, _BEHIND):
            yield re.sub(f"{before}{_OPEN}|{_CLOSE}{behind}", "", hidden)
