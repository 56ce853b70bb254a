"""Where training goes on after a kill: the newest whole checkpoint of a folder.

    checkpoint-000120/state.json          place in the run, the log so far
    checkpoint-000120/tensors.safetensors moved tensors, and the optimizer's state of each

A checkpoint is written beside and renamed, and older ones are removed afterwards: at any moment
there is a whole one, or none was finished yet. Nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CHECKPOINTS = "checkpoints"
"""A stage's folder of them."""

_PREFIX = "checkpoint-"
_STATE, _TENSORS = "state.json", "tensors.safetensors"
_MOVED, _OPTIMIZER = "moved/", "optimizer/"


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint's place and log; its tensors are read by `Checkpoints.restore`."""

    folder: Path
    place: dict[str, int]
    log: dict[str, Any]


class Checkpoints:
    """The checkpoints in `folder`, which is theirs alone; of several processes one writes."""

    def __init__(self, folder: Path, *, is_writer: bool = True) -> None:
        self._folder = folder
        self._is_writer = is_writer

    def load(self) -> Saved | None:
        """Return the newest checkpoint, if there is one."""
        found = self._all()
        if not found:
            return None
        state = json.loads((found[-1] / _STATE).read_text(encoding="utf-8"))
        return Saved(found[-1], state["place"], state["log"])

    def restore(
        self,
        saved: Saved,
        tensors: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Copy a checkpoint into `tensors`, and into the optimizer where it has its state.

        The tensors must be those that were saved, by name and shape.
        """
        stored = load_file(saved.folder / _TENSORS)
        names = {key.removeprefix(_MOVED) for key in stored if key.startswith(_MOVED)}
        assert names == set(tensors), sorted(names ^ set(tensors))
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(stored.pop(f"{_MOVED}{name}"))
        for key, value in stored.items():
            # "step" too: the fused AdamW counts where the parameter is.
            name, _, slot = key.removeprefix(_OPTIMIZER).rpartition("/")
            optimizer.state[tensors[name]][slot] = value.to(tensors[name].device)

    def save(
        self,
        place: dict[str, int],
        log: dict[str, Any],
        tensors: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Write a checkpoint and remove the older ones."""
        if not self._is_writer:
            return
        older = self._all()
        number = int(older[-1].name.removeprefix(_PREFIX)) + 1 if older else 0
        partial = self._folder / f"{_PREFIX}new"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_to_store(tensors, optimizer), partial / _TENSORS)
        state = json.dumps({"place": place, "log": log})
        (partial / _STATE).write_text(state, encoding="utf-8")
        partial.replace(self._folder / f"{_PREFIX}{number:06}")
        for folder in older:
            shutil.rmtree(folder)

    def _all(self) -> list[Path]:
        """Return the whole checkpoints, oldest first."""
        return sorted(self._folder.glob(f"{_PREFIX}[0-9]*"))


def _to_store(
    tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    stored = {f"{_MOVED}{name}": tensor.detach().contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        for slot, value in optimizer.state.get(tensor, {}).items():
            stored[f"{_OPTIMIZER}{name}/{slot}"] = value.contiguous()
    return stored
