"""How runtimes say that there is no memory left; only CUDA has a class for it."""

from __future__ import annotations

import torch

# Of torch on the CPU, of onnxruntime's arena, of C++.
_PHRASES = ("can't allocate memory", "failed to allocate memory", "bad_alloc", "bad allocation")


def is_out_of_memory(error: Exception) -> bool:
    """Say whether a pass failed for want of memory, so that a smaller one may succeed."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return any(phrase in text for phrase in _PHRASES)
