from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export.graph import parity
from export.graph.parity import measure, measure_in_fresh_process
from export.graph.surgery import save_onnx


def test_float_graph_computes_what_torch_computes(exported: Any) -> None:
    report = measure(exported.student_dir, exported.variants["fp32"])
    assert report.max_mean_kl < 1e-6
    assert report.max_logit_difference < 1e-3


def test_every_shape_is_measured_over_prefill_and_16_cached_steps(exported: Any) -> None:
    """Batch 1, 2, 5; length 1, 2, 33 behind nothing; 16 steps behind 1 and 40 cached tokens."""
    assert parity.NUM_DECODE_STEPS == 16
    report = measure(exported.student_dir, exported.variants["fp32"])
    assert report.num_positions == (1 + 2 + 5) * ((1 + 2 + 33) + 2 * 16)


def test_quantized_graph_is_told_from_the_float_one(exported_llama: Any) -> None:
    report = measure(exported_llama.student_dir, exported_llama.variants["int4"])
    assert report.max_mean_kl > 1e-3


@pytest.fixture
def damaged(exported_llama: Any, tmp_path: Path) -> Path:
    """The float graph with one rotary table read one position too far."""
    folder = exported_llama.variants["fp32"]
    model = onnx.load(folder / "model.onnx")
    for initializer in model.graph.initializer:
        if initializer.dims == [160, 8]:
            table = np.roll(numpy_helper.to_array(initializer), -1, axis=0)
            initializer.CopyFrom(numpy_helper.from_array(table, initializer.name))
            break
    save_onnx(model, tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    return tmp_path


def test_damaged_graph_is_told_from_the_right_one(exported_llama: Any, damaged: Path) -> None:
    assert measure(exported_llama.student_dir, damaged).max_mean_kl > 1e-6


def test_fresh_process_measures_the_same(exported_llama: Any) -> None:
    folders = exported_llama.student_dir, exported_llama.variants["int8"]
    assert measure_in_fresh_process(*folders) == measure(*folders)


def test_failed_measurement_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)measurement failed.*no_such_folder"):
        measure_in_fresh_process(tmp_path / "no_such_folder", tmp_path)
