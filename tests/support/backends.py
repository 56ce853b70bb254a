"""A tiny tokenizer, and backends with chosen logits."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from serve.models.backend import ModelInfo, RowLayout
from serve.text.tokenizer import Tokenizer

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
EOS = 2
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


ALPHABET = {
    token: i
    for i, token in enumerate([*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())])
}
"""Of each token its id: 0..2 are special, then one token per byte."""


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Return a byte-level tokenizer of `ALPHABET`, without merges."""
    raw = tokenizers.Tokenizer(models.BPE(vocab=ALPHABET, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(SPECIAL_TOKENS)
    return raw


def build_tokenizer(chat_template: str | None = CHAT_TEMPLATE, extra: str = "") -> Tokenizer:
    """Return the tokenizer of bytes, with `extra` as one more token if given."""
    raw = byte_tokenizer()
    if extra:
        raw.add_tokens([extra])
    return Tokenizer(raw, chat_template, {"bos_token": SPECIAL_TOKENS[1]})


def save_byte_tokenizer(folder: Path) -> None:
    """Write the tokenizer of bytes as transformers saves one."""
    from transformers import PreTrainedTokenizerFast

    end, start = SPECIAL_TOKENS[EOS], SPECIAL_TOKENS[1]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), bos_token=start, eos_token=end, pad_token=end
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


TOKENIZER = build_tokenizer()


class FakeBackend:
    """Next-token logits depend on the newest token alone: row `token_id` of a `(V, V)` table."""

    def __init__(self, logits: torch.Tensor, *, max_model_len: int, max_num_seqs: int) -> None:
        self.logits = logits
        self.info = ModelInfo(
            backend="fake",
            device="cpu",
            precision="float32",
            num_parameters=logits.numel(),
            vocab_size=logits.shape[1],
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            batch_invariant=True,
        )
        self.error: Exception | None = None
        self.may_run = threading.Event()
        self.may_run.set()
        self.is_asked = threading.Event()
        # Before the step of this number, counted down, the model waits for `may_run`.
        self.hold_after = 0
        self.is_held = threading.Event()

    def forward(
        self,
        first_row: int,
        new_token_ids: Sequence[Sequence[int]],
        past_lengths: Sequence[int],
        logit_indices: Sequence[Sequence[int]] | None = None,
    ) -> torch.Tensor:
        self.is_asked.set()
        self.hold_after -= 1
        if self.hold_after == 0:
            self.may_run.clear()
            self.is_held.set()
        assert self.may_run.wait(30), "a test forgot to let the model run"
        if self.error is not None:
            raise self.error
        wanted = logit_indices or [[len(ids) - 1] for ids in new_token_ids]
        return torch.stack(
            [
                self.logits[ids[i]]
                for ids, indices in zip(new_token_ids, wanted, strict=True)
                for i in indices
            ]
        )

    def prepare(self) -> None:
        """There is nothing to prepare."""

    def copy_kv(self, source_row: int, target_row: int, length: int) -> None:
        """There is no cache."""

    def read_kv(self, row: int, start: int, stop: int) -> torch.Tensor:
        return torch.empty(1, 1, stop - start, 0)

    def write_kv(self, row: int, start: int, kv: torch.Tensor) -> None:
        """There is no cache."""

    def scrub_kv(self, row: int, start: int = 0) -> None:
        """There is no cache."""


Pass = list[tuple[int, Sequence[int]]]
"""Of each row the cached tokens, and the new ones."""


class HistoryBackend:
    """Next-token logits depend on every token before, read from rows of its cache.

    So a row that was moved, forked or cut wrongly shows in the tokens that come out.
    """

    VOCAB_SIZE = 40
    EOS = 3

    def __init__(self, *, max_num_seqs: int = 4, max_model_len: int = 64) -> None:
        self.info = ModelInfo("fake", "cpu", "float32", 1, self.VOCAB_SIZE, max_model_len,
                              max_num_seqs)  # fmt: skip
        self.rows: list[list[int]] = [[] for _ in range(RowLayout(max_num_seqs).num_rows)]
        self.calls: list[tuple[int, list[int], list[int]]] = []
        self.error: BaseException | None = None
        self.nan_after: int | None = None
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(997, self.VOCAB_SIZE, generator=generator)
        self.table[:, self.EOS] -= 1

    def forward(
        self,
        first_row: int,
        new_token_ids: Sequence[Sequence[int]],
        past_lengths: Sequence[int],
        logit_indices: Sequence[Sequence[int]] | None = None,
    ) -> torch.Tensor:
        self.before_pass(first_row, list(zip(past_lengths, new_token_ids, strict=True)))
        if self.error is not None:
            raise self.error
        self.calls.append((first_row, [len(ids) for ids in new_token_ids], list(past_lengths)))
        wanted = logit_indices or [[len(ids) - 1] for ids in new_token_ids]
        logits = []
        for i, (ids, past, indices) in enumerate(
            zip(new_token_ids, past_lengths, wanted, strict=True)
        ):
            row = self.rows[first_row + i]
            assert past <= len(row), "the cache holds fewer tokens than the engine thinks"
            row[past:] = ids
            assert len(row) <= self.info.max_model_len
            logits += [self.logits_after(row[: past + j + 1]) for j in indices]
        return torch.stack(logits)

    def before_pass(self, first_row: int, rows: Pass) -> None:
        """Nothing: for models that take their time, or break."""

    def logits_after(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Return `(V,)` for the token behind `token_ids`; NaN behind the token `nan_after`."""
        state = 0
        for token_id in token_ids:
            state = (state * 31 + token_id + 1) % 997
        logits = self.table[state]
        return logits * torch.nan if token_ids[-1] == self.nan_after else logits

    def prepare(self) -> None:
        """There is nothing to prepare."""

    def copy_kv(self, source_row: int, target_row: int, length: int) -> None:
        self.rows[target_row] = self.rows[source_row][:length]

    def read_kv(self, row: int, start: int, stop: int) -> torch.Tensor:
        return torch.tensor(self.rows[row][start:stop]).view(1, 1, -1, 1)

    def write_kv(self, row: int, start: int, kv: torch.Tensor) -> None:
        self.rows[row][start:] = kv.flatten().tolist()

    def scrub_kv(self, row: int, start: int = 0) -> None:
        """Token ids are finite."""


def random_logits(seed: int) -> torch.Tensor:
    """A model that likes digits and sometimes ends; teachers differ from students by the seed."""
    vocab_size = TOKENIZER.num_tokens
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(0))
    logits = 2 * shared + 0.5 * torch.randn(vocab_size, vocab_size, generator=generator)
    logits[:, list(TOKENIZER.encode("0123456789 "))] += 4
    logits[:, EOS] += 3
    return logits


def fixed_logits(text: str) -> torch.Tensor:
    """A model that continues "?" with `text` (no character twice) and then ends."""
    ids = [*TOKENIZER.encode("?" + text), EOS]
    assert len(set(ids)) == len(ids), "the newest token alone must say what comes next"
    logits = torch.full((TOKENIZER.num_tokens, TOKENIZER.num_tokens), -30.0)
    logits[:, EOS] = 0.0
    for current, following in itertools.pairwise(ids):
        logits[current, EOS] = -30.0
        logits[current, following] = 0.0
    return logits
