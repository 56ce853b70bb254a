from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from export.graph.parity import measure, measure_in_fresh_process
from export.graph.surgery import save_onnx
from tests.support.graphs import load_graph


def test_parity_is_measured_over_prefills_and_16_cached_steps_of_every_shape(
    exported_llama: Any,
) -> None:
    """Batch 1, 2, 5; length 1, 2, 33 behind nothing; 16 steps behind 1 and 40 cached tokens."""
    report = measure(exported_llama.student_dir, exported_llama.variants["fp32"])
    assert report.num_positions == (1 + 2 + 5) * ((1 + 2 + 33) + 2 * 16)


@pytest.fixture
def damaged(exported_llama: Any, tmp_path: Path) -> Path:
    """The float graph with one rotary table read one position too far."""
    folder = exported_llama.variants["fp32"]
    model = load_graph(folder)
    for initializer in model.graph.initializer:
        if initializer.dims == [160, 8]:
            table = np.roll(numpy_helper.to_array(initializer), -1, axis=0)
            initializer.CopyFrom(numpy_helper.from_array(table, initializer.name))
            break
    save_onnx(model, tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    return tmp_path


@pytest.mark.parametrize(("kind", "least"), [("int4", 1e-3), ("damaged", 1e-6)])
def test_parity_tells_another_graph_from_the_right_one(
    exported_llama: Any, damaged: Path, kind: str, least: float
) -> None:
    folder = damaged if kind == "damaged" else exported_llama.variants[kind]
    assert measure(exported_llama.student_dir, folder).max_mean_kl > least


def test_parity_in_a_fresh_process_is_the_same(exported_llama: Any) -> None:
    folders = exported_llama.student_dir, exported_llama.variants["int8"]
    assert measure_in_fresh_process(*folders) == measure(*folders)


def test_parity_whose_process_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\necho no such folder >&2; exit 1")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(RuntimeError, match=r"(?s)measurement failed.*no such folder"):
        measure_in_fresh_process(tmp_path, tmp_path)
