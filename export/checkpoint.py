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

_PREFIX = "checkpoint-"
_STATE, _TENSORS = "state.json", "tensors.safetensors"


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint's folder and log; its tensors are read by `Checkpoints.restore`."""

    folder: Path
    log: dict[str, Any]


class Checkpoints:
    """The checkpoints below `folder`; only the writer (of several processes) writes."""

    def __init__(self, folder: Path, *, is_writer: bool = True) -> None:
        self._folder = folder
        self._is_writer = is_writer

    def load(self) -> tuple[dict[str, int], Saved] | tuple[None, None]:
        """Return the place where the newest checkpoint stands, and the checkpoint."""
        found = self._all()
        if not found:
            return None, None
        state = json.loads((found[-1] / _STATE).read_text(encoding="utf-8"))
        return state["place"], Saved(found[-1], state["log"])

    def restore(
        self,
        saved: Saved,
        tensors: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Copy a checkpoint into `tensors`, and into the optimizer if it has its state.

        A tensor that the checkpoint does not know stays as it is: a phase may begin with new ones.
        """
        stored = load_file(saved.folder / _TENSORS)
        with torch.no_grad():
            for name, tensor in tensors.items():
                if f"moved/{name}" in stored:
                    tensor.copy_(stored[f"moved/{name}"])
        for name, tensor in tensors.items():
            prefix = f"optimizer/{name}/"
            state = {
                key.removeprefix(prefix): value
                for key, value in stored.items()
                if key.startswith(prefix)
            }
            if state:
                # A step counter stays on the CPU in float32, as AdamW wants it.
                optimizer.state[tensor] = {
                    key: value if key == "step" else value.to(tensor.device)
                    for key, value in state.items()
                }

    def save(
        self,
        place: dict[str, int],
        log: dict[str, Any],
        tensors: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer | None,
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

    def clear(self) -> None:
        """Remove every checkpoint: training is over."""
        if self._is_writer:
            for folder in self._folder.glob(f"{_PREFIX}*"):
                shutil.rmtree(folder)

    def _all(self) -> list[Path]:
        """Return the whole checkpoints, oldest first."""
        return sorted(self._folder.glob(f"{_PREFIX}[0-9]*"))


def _to_store(
    tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer | None
) -> dict[str, torch.Tensor]:
    stored = {f"moved/{name}": tensor.detach().contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        for key, value in (optimizer.state.get(tensor, {}) if optimizer else {}).items():
            stored[f"optimizer/{name}/{key}"] = value.contiguous()
    return stored
