"""Prompts for the benchmarks: real text as token ids, another piece of it for every run."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serve.text.tokenizer import Tokenizer

MIN_PROMPTS = 1000
"""Different prompts that a text must give, so that prefix caches find next to nothing."""


@dataclass(frozen=True, slots=True)
class PromptSource:
    """Cuts prompts out of one long text, each starting at another token of it.

    `starts` is a seeded permutation of all places at which the longest prompt fits.
    """

    token_ids: tuple[int, ...]
    starts: tuple[int, ...]
    max_tokens: int

    @classmethod
    def of(cls, token_ids: Sequence[int], max_tokens: int, seed: int) -> PromptSource:
        """Raises ValueError when the text gives fewer than `MIN_PROMPTS` prompts."""
        starts = list(range(len(token_ids) - max_tokens + 1))
        if len(starts) < MIN_PROMPTS:
            raise ValueError(
                f"a text of {len(token_ids)} tokens gives {len(starts)} prompts of {max_tokens} "
                f"tokens; {MIN_PROMPTS} are needed"
            )
        random.Random(seed).shuffle(starts)
        return cls(tuple(token_ids), tuple(starts), max_tokens)

    def draw(self, first: int, num_prompts: int, num_tokens: int) -> list[list[int]]:
        """Return prompts number `first`, `first + 1`, …; they begin anew after the last start."""
        assert num_tokens <= self.max_tokens, (num_tokens, self.max_tokens)
        numbers = range(first, first + num_prompts)
        starts = [self.starts[number % len(self.starts)] for number in numbers]
        return [list(self.token_ids[start : start + num_tokens]) for start in starts]


def read_text(bundle: Path) -> list[int]:
    """Return the bundle's held-out prompts and answers as one list of token ids."""
    tokenizer = Tokenizer.load(bundle / "student")
    texts = [f"{r['prompt']}\n{r['teacher']}\n{r['student']}\n" for r in read_records(bundle)]
    return list(tokenizer.encode("".join(texts)))


def read_answers(bundle: Path, num_tokens: int) -> list[tuple[list[int], int]]:
    """Return chats with the teacher's answers, until these have `num_tokens` in sum.

    Each is the token ids of prompt and answer, and how many of them are the answer's.
    """
    tokenizer = Tokenizer.load(bundle / "student")
    chats: list[tuple[list[int], int]] = []
    for record in read_records(bundle):
        prompt = tokenizer.encode_chat([("user", record["prompt"])])
        answer = tokenizer.encode(record["teacher"], is_continuation=True)
        chats.append(([*prompt, *answer], len(answer)))
        if sum(count for _, count in chats) >= num_tokens:
            break
    return chats


def read_records(bundle: Path) -> list[dict[str, str]]:
    """Return the lines of `eval/texts.jsonl`: `prompt`, `teacher`'s answer, `student`'s answer."""
    lines = (bundle / "eval" / "texts.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]
