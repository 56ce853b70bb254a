"""Several processes that train one student: `accelerate launch -m tandem export run RECIPE`.

Data parallelism by hand over torch.distributed: each process takes every n-th micro-batch of an
optimizer step and the gradients are added up, so that n processes compute what one does with
accumulation. The launcher says who we are (RANK, WORLD_SIZE); alone, nothing is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")

# The other processes wait while the main one samples, exports and evaluates.
_TIMEOUT = timedelta(days=7)


class World:
    """The processes of this run. The default is a world of one."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @classmethod
    def from_environment(cls) -> World:
        """Join the processes that `accelerate launch` (or torchrun) started, if there are any."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        # Waiting happens on the CPU even where the gradients are on a GPU.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=_TIMEOUT)
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's part of `items`: every `size`-th."""
        return items[self.rank :: self.size]

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            distributed.barrier()

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def broadcast(self, value: T) -> T:
        """Return the main process's value (pickled on its way: small things only)."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        distributed.broadcast_object_list(box, src=0)
        received: T = box[0]
        return received

    def close(self) -> None:
        if self.size > 1 and distributed.is_initialized():
            distributed.destroy_process_group()
