"""The graph that is served, rewritten from the file's."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from serve.models.onnx_graph import (
    LAST_POSITIONS,
    LOGIT_ROWS,
    TOTAL_LENGTH,
    check_cuda_types,
    serving_graph,
)

VARIANTS = ("fp32", "int8", "float16", "bfloat16")


@pytest.mark.parametrize("variant", VARIANTS)
def test_serving_graph_has_no_control_flow_and_no_shape_arithmetic(
    graphs: Path, variant: str
) -> None:
    graph = serving_graph(graphs / variant / "model.onnx").graph
    inputs = {i.name for i in graph.input if not i.name.startswith("past_key_values.")}
    assert inputs == {"input_ids", LOGIT_ROWS, LAST_POSITIONS, TOTAL_LENGTH}
    ops = {node.op_type for node in graph.node}
    assert ops.isdisjoint({"If", "Shape", "Size", "ReduceSum", "Sub"})
    assert LOGIT_ROWS not in {i.name for i in graph.initializer}


def test_serving_graph_keeps_what_is_needed_of_unsorted_nodes(graphs: Path, tmp_path: Path) -> None:
    path = graphs / "fp32" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    expected = {tuple(node.output) for node in serving_graph(path).graph.node}
    found = {tuple(node.output) for node in serving_graph(tmp_path / "model.onnx").graph.node}
    assert found == expected


@pytest.mark.parametrize("missing", ["GroupQueryAttention", LOGIT_ROWS])
def test_graph_of_another_exporter_is_refused(graphs: Path, tmp_path: Path, missing: str) -> None:
    model = onnx.load(graphs / "fp32" / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        node.op_type = "MultiHeadAttention" if node.op_type == missing else node.op_type
    for value in [i for i in model.graph.input if i.name == missing]:
        model.graph.input.remove(value)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="cannot be served: it has no GroupQueryAttention or no"):
        serving_graph(tmp_path / "model.onnx")


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_float32_cache_is_refused_on_cuda(graphs: Path, variant: str) -> None:
    path = graphs / variant / "model.onnx"
    with pytest.raises(ValueError, match=f"{variant}: its cache is FLOAT, and on CUDA"):
        check_cuda_types(serving_graph(path), path)


@pytest.mark.parametrize("variant", ["float16", "bfloat16"])
def test_half_caches_are_taken_on_cuda(graphs: Path, variant: str) -> None:
    path = graphs / variant / "model.onnx"
    check_cuda_types(serving_graph(path), path)
