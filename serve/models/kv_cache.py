"""Preallocated keys and values: one pair per layer, one row per running sequence."""

from __future__ import annotations

import math
import mmap

import torch

_SCRUBBED_TOKENS = 64


class KVCache:
    """`keys[layer]` and `values[layer]`, each `(rows, num_kv_heads, max_len, head_dim)`.

    They are views of one tensor, so that copying a row is one operation for all layers. Rows start
    zeroed, so that a masked position never multiplies a NaN. On the CPU the memory is reserved but
    not touched: a row costs physical memory only up to the length it was used to.
    """

    def __init__(
        self,
        num_layers: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.tensor = _zeros((2 * num_layers, *shape), dtype, device)
        self.keys = list(self.tensor[:num_layers])
        self.values = list(self.tensor[num_layers:])

    @property
    def max_len(self) -> int:
        return self.tensor.shape[3]

    @property
    def size_bytes(self) -> int:
        """Address space reserved, in bytes."""
        return self.tensor.nbytes

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of row `source` over row `target`."""
        self.tensor[:, target, :, :length] = self.tensor[:, source, :, :length]

    def read(self, row: int, start: int, stop: int) -> torch.Tensor:
        """Return a copy of a row's tokens, `(2 * num_layers, num_kv_heads, stop - start, D)`."""
        return self.tensor[:, row, :, start:stop].clone()

    def write(self, row: int, start: int, kv: torch.Tensor) -> None:
        """Put what `read` returned into a row, its first token at position `start`."""
        self.tensor[:, row, :, start : start + kv.shape[2]] = kv

    def scrub(self, row: int, start: int) -> None:
        """Zero the parts of a row that hold NaN or inf, from position `start` on.

        Others are only read: on the CPU, what was never used takes no memory afterwards either.
        """
        for part in self.tensor[:, row, :, start:].split(_SCRUBBED_TOKENS, dim=2):
            if not bool(part.isfinite().all()):
                part.zero_()


class CachedRows:
    """The part of `serve.models.backend.Backend` that is about the rows of its `cache` alone."""

    cache: KVCache

    def copy_kv(self, source_row: int, target_row: int, length: int) -> None:
        """See `Backend.copy_kv`."""
        self.cache.copy_row(source_row, target_row, length)

    def read_kv(self, row: int, start: int, stop: int) -> torch.Tensor:
        """See `Backend.read_kv`."""
        return self.cache.read(row, start, stop)

    def write_kv(self, row: int, start: int, kv: torch.Tensor) -> None:
        """See `Backend.write_kv`."""
        self.cache.write(row, start, kv)

    def scrub_kv(self, row: int, start: int = 0) -> None:
        """See `Backend.scrub_kv`."""
        self.cache.scrub(row, start)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Untouched zero pages, and small ones: with huge ones every head of every row took 2 MiB with
    # its first token, 1.4 GB instead of 0.1 for 16 short sequences, and was not faster.
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
