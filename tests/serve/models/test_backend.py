"""How runtimes say that there is no memory left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from serve.models.backend import is_out_of_memory


def run_onnx_out_of_memory() -> None:
    graph = helper.make_graph(
        [helper.make_node("ConstantOfShape", ["shape"], ["y"])],
        "large",
        [helper.make_tensor_value_info("shape", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    session.run(None, {"shape": np.array([1 << 44])})


def run_cuda_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize(
    "run",
    [
        lambda: torch.empty(1 << 48),
        run_onnx_out_of_memory,
        run_cuda_out_of_memory,
        lambda: np.empty(1 << 48),
        lambda: bytearray(1 << 48),
    ],
)
def test_is_out_of_memory_understands_every_runtime(run: Callable[[], Any]) -> None:
    with pytest.raises(Exception) as caught:
        run()
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("no device"), ValueError("memory format")])
def test_is_out_of_memory_of_another_error_says_no(error: Exception) -> None:
    assert not is_out_of_memory(error)
