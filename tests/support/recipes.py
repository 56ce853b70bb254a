"""Recipes of tiny exports, and what an export tells of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from export.run.settings import ExportConfig

ACCEPT_ALL: Mapping[str, Any] = {
    "require_correct": False,
    "drop_truncated": False,
    "max_repetition": 1.0,
    "max_foreign_letters": 1.0,
}
"""Random weights answer nothing right, and end where they are cut."""

SMALL: Mapping[str, Any] = {
    "tasks": {"max_train": 24, "max_test": 2},
    "sample": {"max_tokens": 12, "max_num_seqs": 8, "max_model_len": 256},
    "accept": ACCEPT_ALL,
    "prune": {"num_removed_layers": 1, "num_texts": 2, "num_candidates": 1},
    "evaluate": {
        "max_num_seqs": 2,
        "max_task_prompts": 0,
        "num_samples": 1,
        "k": [1],
        "num_timed_tokens": 2,
        "num_rounds": 1,
    },
    # Random weights are no teacher to come near.
    "gates": {"student_kl": 20.0},
}
"""The least that every stage can do something with; phases and variants are the test's."""

RESUMED: Mapping[str, Any] = {
    **SMALL,
    "distill": {
        "phases": [
            {"num_epochs": 2, "learning_rate": 1e-3, "tokens_per_step": 64},
            {
                "data": "student",
                "divergence": "reverse_kl",
                "num_prompts_per_round": 6,
                "tokens_per_step": 32,
            },
        ],
        "checkpoint_every_s": 0.001,
    },
    "variants": {"int8": {"bits": 8, "block_size": 32}},
}
"""Two phases with a checkpoint at every step, for runs that are killed."""


def make_config(folder: Path, teacher: object = "no/model-7B", **sections: Any) -> ExportConfig:
    """Return the settings of a run in `folder` on ten prompts."""
    settings: dict[str, Any] = {
        "teacher": str(teacher),
        "output_dir": str(folder / "run"),
        "cache_dir": str(folder / "cache"),
        "tasks": {"max_train": 8, "max_test": 2},
        "prune": {"num_removed_layers": 1, "num_texts": 2},
    }
    return ExportConfig.model_validate(settings | sections)


def write_recipe(path: Path, settings: Mapping[str, Any], **paths: Path) -> Path:
    """Write a recipe; `paths` are its folders: teacher, output_dir, cache_dir, student."""
    plain = {key: _plain(value) for key, value in settings.items()}
    given = plain | {key: str(value) for key, value in paths.items()}
    path.write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
    return path


def _plain(value: Any) -> Any:
    """Return a copy, so that YAML writes no anchors."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


@dataclass
class RecordingReporter:
    """What an export said, and how far its progress bars came."""

    said: list[str] = field(default_factory=list)
    progress: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def say(self, message: str) -> None:
        self.said.append(message)

    def track(self, label: str) -> Callable[[int, int], None]:
        shown = self.progress.setdefault(label, [])
        return lambda done, total: shown.append((done, total))
