"""`tandem export` in this process, on a recipe of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tandem.cli
from export.pipeline import Pipeline
from tests.support.recipes import write_recipe

SETTINGS: dict[str, Any] = {
    "tasks": {"max_train": 8, "max_test": 2},
    "sample": {"max_tokens": 8, "max_num_seqs": 16, "max_model_len": 256},
    "accept": {"require_correct": False, "drop_truncated": False, "max_repetition": 1.0},
    "prune": {"num_removed_layers": 1, "num_texts": 2},
}


def write_rows_recipe(folder: Path, teacher: Path, **changes: Any) -> Path:
    """Write a recipe of 40 prompts in a file beside it, whose run is `folder/run`."""
    jsonl = folder / "tasks.jsonl"
    if not jsonl.exists():
        rows = [{"prompt": f"Say {n}."} for n in range(40)]
        jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {**SETTINGS["tasks"], "sources": [{"kind": "jsonl", "path": str(jsonl)}]}
    paths = {"teacher": teacher, "output_dir": folder / "run", "cache_dir": folder / "cache"}
    settings = SETTINGS | {"tasks": tasks} | changes
    return write_recipe(folder / "recipe.yaml", settings, **paths)


def run(*words: object) -> int:
    """Run `tandem export` and return its exit code."""
    with pytest.raises(SystemExit) as exit_info:
        tandem.cli.main(["export", *map(str, words)])
    return int(exit_info.value.code or 0)


def stages_of(recipe: Path) -> list[str]:
    """Return the names of the stages that are there, finished or not."""
    work = recipe.parent / "run" / "work"
    return sorted(path.name.partition("-")[0] for path in work.glob("*"))


def stub_package(monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> list[Path]:
    """Let the last step fail, or do nothing: a whole run takes 10 s. Returns where it got to."""
    packaged: list[Path] = []

    def package(pipeline: Pipeline) -> None:
        packaged.append(pipeline.config.output_dir)
        if error is not None:
            raise error

    monkeypatch.setattr(Pipeline, "package", package)
    return packaged
