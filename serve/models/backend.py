"""The one thing an engine needs from a runtime: a forward pass over rows of a KV cache.

Two runtimes implement it: `serve.models.torch_backend` and `serve.models.onnx_backend`.
`RowLayout` says what each row is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

NUM_PREFILL_ROWS = 4
NUM_SCORING_ROWS = 8
# Of torch on the CPU, of onnxruntime's arena, of C++; only CUDA has a class for it.
_NO_MEMORY = (
    "can't allocate memory",
    "failed to allocate memory",
    "bad_alloc",
    "bad allocation",
)


@dataclass(frozen=True, slots=True)
class RowLayout:
    """The rows of a preallocated KV cache.

    Sequences that decode hold rows from 0 on, without gaps. The others, up to row `max_num_seqs`
    included, are free: a decode step may overwrite them to pad its batch. Long prompts come in
    chunk by chunk in the rows `prefill`, completions are scored in the rows `scoring`.

    >>> RowLayout(16).prefill, RowLayout(16).scoring, RowLayout(16).num_rows
    (range(17, 21), range(21, 29), 29)
    """

    max_num_seqs: int

    @property
    def prefill(self) -> range:
        return range(self.max_num_seqs + 1, self.max_num_seqs + 1 + NUM_PREFILL_ROWS)

    @property
    def scoring(self) -> range:
        return range(self.prefill.stop, self.prefill.stop + NUM_SCORING_ROWS)

    @property
    def num_rows(self) -> int:
        return self.scoring.stop


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a served model is; answered by GetModels and shown by `tandem ask`.

    `vocab_size` is the width of its logits, those of tokens alone (`serve.text.real_tokens`).
    `batch_invariant`: a sequence's logits do not depend on what else is in the batch, checked at
    the start on this machine's kernels.
    """

    backend: str
    device: str
    precision: str
    num_parameters: int
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    batch_invariant: bool = False

    @property
    def rows(self) -> RowLayout:
        return RowLayout(self.max_num_seqs)


class Backend(Protocol):
    """A model and its KV cache: rows of `max_model_len` tokens, laid out as `info.rows` says."""

    info: ModelInfo

    def forward(
        self,
        first_row: int,
        new_token_ids: Sequence[Sequence[int]],
        past_lengths: Sequence[int],
        logit_indices: Sequence[Sequence[int]] | None = None,
    ) -> torch.Tensor:
        """Run new tokens through the model and return next-token logits, `(N, V)` float32.

        Row `first_row + i` holds `past_lengths[i]` cached tokens and receives `new_token_ids[i]`
        (lengths may differ); their keys and values are stored behind the cached ones.
        `logit_indices[i]` picks the positions within `new_token_ids[i]` whose logits are
        returned, row after row; by default the last one of each row. No other logits are
        computed. The result is valid until the next call. A step of one token for each of the
        rows from 0 on may overwrite the free rows behind them, up to row `max_num_seqs`.
        """
        ...

    def choose_kernels(self) -> None:
        """Take the fastest way of computing that is batch-invariant here; `info` says if one is.

        Called once, before `prepare`. Overwrites the rows of sequences.
        """
        ...

    def prepare(self) -> None:
        """Get ready to run on the calling thread; called once, before any engine has work."""
        ...

    def copy_kv(self, source_row: int, target_row: int, length: int) -> None:
        """Copy the first `length` cached tokens of one row over another row's."""
        ...

    def read_kv(self, row: int, start: int, stop: int) -> torch.Tensor:
        """Return a copy of the cached tokens `start` to `stop` of a row; `shape[2]` counts them."""
        ...

    def write_kv(self, row: int, start: int, kv: torch.Tensor) -> None:
        """Put what `read_kv` returned into a row, its first token at position `start`."""
        ...

    def scrub_kv(self, row: int, start: int = 0) -> None:
        """Zero what is not finite of a row, from position `start` on.

        Attention gives hidden positions the weight 0, which does not undo a NaN.
        """
        ...


def logit_rows(
    new_token_ids: Sequence[Sequence[int]],
    logit_indices: Sequence[Sequence[int]] | None,
    num_columns: int,
) -> list[int]:
    """Return the wanted positions as indices into the flattened, right-padded `(B * T)` batch."""
    if logit_indices is None:
        logit_indices = [[len(ids) - 1] for ids in new_token_ids]
    return [row * num_columns + i for row, wanted in enumerate(logit_indices) for i in wanted]


def is_out_of_memory(error: Exception) -> bool:
    """Say whether a pass failed for want of memory, so that a smaller one may succeed."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return any(phrase in text for phrase in _NO_MEMORY)
