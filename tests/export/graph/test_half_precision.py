from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

from export.graph.half_precision import to_half
from export.graph.surgery import LOGIT_ROWS
from export.run.errors import ExportError
from tests.support.graphs import load_graph, named_node, open_session, weights_of
from tests.support.random_models import NUM_LAYERS

BODY, HEAD = "/model/layers.0/mlp/down_proj/MatMul", "/lm_head/MatMul"


@pytest.fixture(scope="module")
def graphs(exported_llama: Any) -> dict[str, onnx.ModelProto]:
    """The graph itself, `fp32`, and the two that are made of it."""
    source: Path = exported_llama.variants["fp32"]
    halves = {n: to_half(load_graph(source), n) for n in ("float16", "bfloat16")}
    return {"fp32": load_graph(source), **halves}


@pytest.mark.parametrize(
    ("name", "onnx_type"), [("float16", TensorProto.FLOAT16), ("bfloat16", TensorProto.BFLOAT16)]
)
def test_to_half_rounds_the_cache_and_keeps_logits_in_float(
    graphs: dict[str, onnx.ModelProto], name: str, onnx_type: int
) -> None:
    graph = graphs[name].graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    cached = [t for key, t in types.items() if key.startswith(("past_key_values", "present"))]
    assert cached == [onnx_type] * 4 * NUM_LAYERS
    assert types["logits"] == TensorProto.FLOAT
    assert types["input_ids"] == types[LOGIT_ROWS] == TensorProto.INT64


@pytest.mark.parametrize("architecture", ["llama", "llama-untied"])
@pytest.mark.parametrize(
    ("method", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)]
)
def test_to_half_rounds_all_weights_but_the_heads(
    export_once: Callable[[str], Any], architecture: str, method: Any, dtype: torch.dtype
) -> None:
    source = load_graph(export_once(architecture).variants["fp32"])
    before = weights_of(source)
    (head,) = [n.input[1] for n in source.graph.node if "logits" in n.output]
    for name, value in weights_of(to_half(source, method)).items():
        if name == head or before[name].dtype != np.float32:
            assert value.dtype == before[name].dtype
            np.testing.assert_array_equal(value, before[name])
        else:
            expected = torch.from_numpy(before[name].copy()).to(dtype).float()
            assert value.dtype.name == method
            np.testing.assert_array_equal(value.astype(np.float32), expected.numpy())


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_to_half_keeps_the_epsilon_of_norms(graphs: dict[str, onnx.ModelProto], name: str) -> None:
    def epsilons(model: onnx.ModelProto) -> list[float]:
        return [a.f for n in model.graph.node for a in n.attribute if a.name == "epsilon"]

    assert len(epsilons(graphs[name])) == 2 * NUM_LAYERS + 1
    assert epsilons(graphs[name]) == epsilons(graphs["fp32"])
    assert min(epsilons(graphs[name])) > 0


def test_to_half_in_bfloat16_has_sound_types_but_no_kernels_on_a_cpu(
    graphs: dict[str, onnx.ModelProto],
) -> None:
    """onnxruntime checks all types before it looks for kernels: see the mistake at the end."""
    model = onnx.ModelProto()
    model.CopyFrom(graphs["bfloat16"])
    with pytest.raises(NoKernel, match=r"implementation for MatMul\(13\)"):
        open_session(model)
    head = named_node(model, HEAD)
    head.input[0] = head.input[0].removesuffix("_float32")
    with pytest.raises(Fail, match=r"Type parameter \(T\).* bound to different types"):
        open_session(model)


def test_to_half_of_a_weight_beyond_float16_is_refused(exported_llama: Any) -> None:
    model = load_graph(exported_llama.variants["fp32"])
    name = named_node(model, BODY).input[1]
    (tensor,) = [i for i in model.graph.initializer if i.name == name]
    large = numpy_helper.to_array(tensor).copy()
    large[3, 4] = -70000
    tensor.CopyFrom(numpy_helper.from_array(large, name))
    with pytest.raises(ExportError, match=rf"{name} reaches 70000, beyond 65504; use bfloat16"):
        to_half(model, "float16")
    assert len(weights_of(to_half(model, "bfloat16"))) > 0
