"""Preallocated keys and values: one tensor pair per layer, one row per running sequence."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch


class KVCache:
    """`keys[layer]` and `values[layer]`, each `(max_num_seqs, num_kv_heads, max_len, head_dim)`.

    Rows start zeroed, so that a masked position never multiplies a NaN. On the CPU the memory is
    reserved but not touched: a row costs physical memory only up to the length it was used to.
    """

    def __init__(
        self,
        num_layers: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.keys = [_zeros(shape, dtype, device) for _ in range(num_layers)]
        self.values = [_zeros(shape, dtype, device) for _ in range(num_layers)]

    @property
    def max_len(self) -> int:
        return self.keys[0].shape[2]

    @property
    def size_bytes(self) -> int:
        """Address space reserved, in bytes."""
        return sum(t.nbytes for t in self._tensors())

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of row `source` over row `target`."""
        for tensor in self._tensors():
            tensor[target, :, :length] = tensor[source, :, :length]

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from self.keys
        yield from self.values


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # calloc hands out untouched zero pages; torch.zeros writes them all.
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
