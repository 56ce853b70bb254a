"""The teacher's logits at the completion positions, on disk once for every student that follows.

    index.json               what they are of: examples, teacher, kind; where each shard begins
    shard-00000.safetensors  the rows of consecutive examples, one after the other

`dense` keeps float16 logits, `top_k` the K likeliest tokens with the mass of all others,
`random_sampling` tokens drawn from the teacher (`export.student.losses` has what each means as a
target). A shard is renamed when it is whole; a rerun keeps finished ones and comes to the same
bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file

from bundle.atomic import write_atomically
from bundle.hashing import hash_json
from export.run.errors import ExportError
from export.run.settings import CacheConfig
from export.student.losses import RandomTargets, SparseTargets, Targets
from export.teacher.examples import Example, collate, micro_batches
from serve.text.real_tokens import EVERY_ROW, RealTokens

INDEX_NAME = "index.json"
MAX_SHARD_BYTES = 256 * 2**20
_MAX_BATCH_TOKENS = 2048
_NUM_SLICE_ROWS = 256

Rows = dict[str, torch.Tensor]
"""Named tensors with one row per completion position, as a shard holds them."""


class CacheIndex(BaseModel):
    """What a cache is of, and the first example of each shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    examples_sha256: str
    teacher_sha256: str
    cache: CacheConfig
    num_vocab_tokens: int
    shard_starts: tuple[int, ...]


class LogitsCache:
    """A finished cache, read row by row from disk."""

    def __init__(self, folder: Path, index: CacheIndex, examples: Sequence[Example]) -> None:
        self.index = index
        self._folder = folder
        self._rows: dict[Example, tuple[int, slice]] = {}
        stops = (*index.shard_starts[1:], len(examples))
        for shard, (start, stop) in enumerate(zip(index.shard_starts, stops, strict=True)):
            of_shard = examples[start:stop]
            ends = accumulate(len(example.completion_token_ids) for example in of_shard)
            for example, end in zip(of_shard, ends, strict=True):
                rows = slice(end - len(example.completion_token_ids), end)
                self._rows.setdefault(example, (shard, rows))

    @classmethod
    def open(cls, folder: Path, examples: Sequence[Example], teacher_sha256: str) -> LogitsCache:
        """Open the cache of `examples`, in that order, by the teacher with those weights.

        ExportError when it is of others, naming both hashes, and when shards are missing.
        """
        if not (folder / INDEX_NAME).is_file():
            raise ExportError(f"{folder} holds no logits cache: {INDEX_NAME} is missing")
        index = _read_index(folder)
        _check_same("examples", index.examples_sha256, hash_examples(examples))
        _check_same("teacher", index.teacher_sha256, teacher_sha256)
        paths = [folder / shard_name(shard) for shard in range(len(index.shard_starts))]
        num_missing = sum(not path.is_file() for path in paths)
        if num_missing:
            raise ExportError(
                f"{folder} lacks {num_missing} of {len(paths)} shards: write the cache to its end"
            )
        return cls(folder, index, examples)

    @property
    def size_bytes(self) -> int:
        """The size of all files."""
        return sum(path.stat().st_size for path in self._folder.iterdir())

    def targets(self, batch: Sequence[Example]) -> Targets:
        """Return the targets at the batch's completion positions, as `student.step.collate` has
        them: one example's after the other's. ExportError for an example that is not cached."""
        parts = [self._targets(example) for example in batch]
        if isinstance(parts[0], torch.Tensor):
            return torch.cat(parts)  # type: ignore[arg-type]
        return type(parts[0]).concatenate(parts)  # type: ignore[arg-type]

    def _targets(self, example: Example) -> Targets:
        if example not in self._rows:
            raise ExportError(
                f"an example of {len(example)} tokens is not in the cache at {self._folder}: it "
                "holds the teacher's logits of the examples it was written for alone"
            )
        shard, rows = self._rows[example]
        with safe_open(self._folder / shard_name(shard), "pt") as file:
            return decode({name: file.get_slice(name)[rows] for name in file.keys()})  # noqa: SIM118


def write_logits_cache(
    folder: Path,
    teacher: Any,
    examples: Sequence[Example],
    config: CacheConfig,
    *,
    teacher_sha256: str,
    real_tokens: RealTokens = EVERY_ROW,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LogitsCache:
    """Write what is still missing of the cache and open it; `progress` counts examples.

    Kept are the logits of `real_tokens`. ExportError when top_k leaves no tail, and when `folder`
    holds the cache of something else.
    """
    assert config.kind != "none", "nothing to write"
    num_vocab_tokens = real_tokens.within(teacher.config.vocab_size).num_tokens
    check_top_k(config, num_vocab_tokens)
    num_rows = [len(example.completion_token_ids) for example in examples]
    max_shard_rows = max(max_shard_bytes // estimate_bytes(1, num_vocab_tokens, config), 1)
    index = _begin(
        folder,
        CacheIndex(
            examples_sha256=hash_examples(examples),
            teacher_sha256=teacher_sha256,
            cache=config,
            num_vocab_tokens=num_vocab_tokens,
            shard_starts=_plan_shards(num_rows, max_shard_rows),
        ),
    )
    stops = (*index.shard_starts[1:], len(examples))
    for shard, (start, stop) in enumerate(zip(index.shard_starts, stops, strict=True)):
        path = folder / shard_name(shard)
        if not path.exists():
            shard_examples = list(enumerate(examples))[start:stop]
            _write_shard(path, teacher, shard_examples, index, real_tokens)
        progress(stop, len(examples))
    return LogitsCache.open(folder, examples, teacher_sha256)


def estimate_bytes(num_tokens: int, vocab_size: int, config: CacheConfig) -> int:
    """Return how large the cache of `num_tokens` completion tokens is, file headers aside.

    >>> [estimate_bytes(1, 49_152, CacheConfig(kind=k)) for k in ("dense", "top_k")]
    [98304, 386]
    """
    return (
        num_tokens
        * {
            "none": 0,
            "dense": 2 * vocab_size,
            "top_k": (4 + 2) * config.top_k + 2,
            "random_sampling": 4 * config.num_draws + 4,
        }[config.kind]
    )


def check_top_k(config: CacheConfig, num_vocab_tokens: int) -> None:
    """Raise ExportError when a top-k cache would have no tail."""
    if config.kind == "top_k" and config.top_k >= num_vocab_tokens:
        raise ExportError(
            f"cache.top_k {config.top_k} is not less than the {num_vocab_tokens} tokens of the "
            "vocabulary: choose a smaller one, or cache.kind dense"
        )


def hash_examples(examples: Sequence[Example]) -> str:
    """Return the hex SHA-256 of the token ids of all examples, in order."""
    return hash_json([[e.prompt_token_ids, e.completion_token_ids] for e in examples])


def shard_name(shard: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{shard:05}.safetensors"


# --- one row of logits, as it is kept ------------------------------------------------------------


def encode(logits: torch.Tensor, config: CacheConfig, generator: torch.Generator) -> Rows:
    """Return what a cache keeps of logits `(N, V)` of any float dtype, on the CPU."""
    logits = logits.float().cpu()
    if config.kind == "dense":
        # Relative to the largest: float16 has its finest steps where the probable tokens are.
        shifted = logits - logits.amax(-1, keepdim=True)
        return {"logits": shifted.clamp_min(torch.finfo(torch.float16).min).half()}
    logprobs = logits.log_softmax(-1)
    if config.kind == "top_k":
        listed, token_ids = logprobs.topk(config.top_k)
        tail = logprobs.scatter(1, token_ids, -torch.inf).logsumexp(-1)
        return {
            "token_ids": token_ids.int(),
            "logprobs": listed.half(),
            "tail_logprob": tail.half(),
        }
    probabilities = logprobs.exp()
    draws = probabilities.multinomial(config.num_draws, replacement=True, generator=generator)
    entropy = -torch.xlogy(probabilities, probabilities).sum(-1)
    return {"token_ids": draws.int(), "entropy": entropy}


def decode(rows: Rows) -> Targets:
    """Return the targets that `encode` made the rows from, up to float16.

    Rounded log-probabilities are renormalised, without which a KL to them could be negative.
    """
    if "logits" in rows:
        return rows["logits"]
    token_ids = rows["token_ids"].long()
    if "logprobs" in rows:
        rounded = torch.cat([rows["logprobs"], rows["tail_logprob"][:, None]], 1).float()
        logprobs = rounded.log_softmax(-1)
        return SparseTargets(token_ids, logprobs[:, :-1].contiguous(), logprobs[:, -1].contiguous())
    weights = torch.full(token_ids.shape, 1 / token_ids.shape[1])
    return RandomTargets(token_ids, weights, rows["entropy"])


# --- writing -------------------------------------------------------------------------------------


def _begin(folder: Path, index: CacheIndex) -> CacheIndex:
    """Write the index, or return the one that is there, if it is of the same cache."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / INDEX_NAME
    if path.is_file():
        found = _read_index(folder)
        _check_same("examples", found.examples_sha256, index.examples_sha256)
        _check_same("teacher", found.teacher_sha256, index.teacher_sha256)
        if found.model_copy(update={"shard_starts": index.shard_starts}) != index:
            raise ExportError(
                f"{folder} holds a logits cache with other settings, {_settings(found)}, than "
                f"{_settings(index)}: remove it, or write to another folder"
            )
        return found
    with write_atomically(path) as partial:
        partial.write_text(index.model_dump_json(indent=2) + "\n")
    return index


def _read_index(folder: Path) -> CacheIndex:
    try:
        return CacheIndex.model_validate_json((folder / INDEX_NAME).read_text())
    except ValidationError as error:
        first = error.errors()[0]
        raise ExportError(
            f"{folder / INDEX_NAME} is of another version or damaged, {first['loc']}: "
            f"{first['msg']}; remove the folder and write the cache again"
        ) from None


def _settings(index: CacheIndex) -> str:
    return f"{index.cache!r} over {index.num_vocab_tokens} tokens"


def _check_same(what: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise ExportError(
            f"the logits cache is of other {what}: sha256 {found}, not {wanted}; remove it, or "
            "write to another folder"
        )


def _plan_shards(num_rows: Sequence[int], max_shard_rows: int) -> tuple[int, ...]:
    """Return the first example of each shard: as many examples as fit, at least one."""
    starts, rows = [0], 0
    for index, count in enumerate(num_rows):
        if rows and rows + count > max_shard_rows:
            starts.append(index)
            rows = 0
        rows += count
    return tuple(starts)


@torch.inference_mode()
def _write_shard(
    path: Path,
    teacher: Any,
    examples: Sequence[tuple[int, Example]],
    index: CacheIndex,
    real_tokens: RealTokens,
) -> None:
    """Write one shard: of (number, example) pairs, encoded example by example."""
    by_number: dict[int, Rows] = {}
    for batch in micro_batches(examples, _MAX_BATCH_TOKENS, lambda numbered: len(numbered[1])):
        hidden = _completion_hidden(teacher, [example for _, example in batch])
        for (number, _), states in zip(batch, hidden, strict=True):
            generator = torch.Generator().manual_seed(index.cache.seed * 1_000_003 + number)
            by_number[number] = _concatenate(
                encode(real_tokens.cut(teacher.lm_head(part)), index.cache, generator)
                for part in states.split(_NUM_SLICE_ROWS)
            )
    with write_atomically(path) as partial:
        save_file(_concatenate(by_number[number] for number, _ in examples), partial)


def _completion_hidden(teacher: Any, batch: Sequence[Example]) -> tuple[torch.Tensor, ...]:
    """Return the last hidden states `(T, H)` of each example's completion positions."""
    device = next(teacher.parameters()).device
    input_ids, positions, _ = collate(batch)
    hidden = teacher.model(input_ids=input_ids.to(device), use_cache=False).last_hidden_state
    rows: torch.Tensor = hidden.flatten(0, 1)[positions.to(device)]
    return torch.split(rows, [len(example.completion_token_ids) for example in batch])


def _concatenate(parts: Iterator[Rows]) -> Rows:
    tensors = list(parts)
    return {name: torch.cat([part[name] for part in tensors]) for name in tensors[0]}
