"""The graph that is served, and sessions that never fall back on another device."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from serve.models.onnx_backend import OnnxBackend
from serve.models.onnx_graph import (
    LAST_POSITIONS,
    LOGIT_ROWS,
    TOTAL_LENGTH,
    check_cuda_types,
    serving_graph,
)
from serve.models.onnx_session import (
    bind_tensor,
    check_first_provider,
    make_session,
    provider_options,
    session_options,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
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


def test_cuda_that_is_missing_is_an_error_and_no_reason_for_the_cpu(graphs: Path) -> None:
    with pytest.raises(RuntimeError, match="CUDAExecutionProvider is not available"):
        make_session(graphs / "fp32" / "model.onnx", "cuda", None)
    with pytest.raises(RuntimeError, match="CUDAExecutionProvider is not available"):
        OnnxBackend.load(graphs / "float16", device="cuda", max_num_seqs=5, max_model_len=64)


def test_session_that_fell_back_is_refused(graphs: Path) -> None:
    session = make_session(graphs / "fp32" / "model.onnx", "cpu", 1)
    with pytest.raises(RuntimeError, match="fell back from CUDAExecutionProvider"):
        check_first_provider(session, "CUDAExecutionProvider")


def test_cuda_options_name_stream_and_graphs() -> None:
    options = provider_options(torch.device("cuda:1"), 4711, cuda_graphs=True)
    assert (options["device_id"], options["user_compute_stream"]) == ("1", "4711")
    assert options["enable_cuda_graph"] == "1" and options["use_tf32"] == "0"


def test_cuda_without_a_stream_has_its_own() -> None:
    options = provider_options(CUDA, 0, cuda_graphs=False)
    assert "user_compute_stream" not in options and options["enable_cuda_graph"] == "0"


def test_cpu_has_no_provider_options() -> None:
    assert provider_options(CPU, 0, cuda_graphs=True) == {}


def test_cuda_session_keeps_one_thread(tmp_path: Path) -> None:
    assert session_options(tmp_path / "model.onnx", CUDA, None).intra_op_num_threads == 1
    assert session_options(tmp_path / "model.onnx", CPU, 3).intra_op_num_threads == 3


@pytest.mark.parametrize(("shares_cores", "is_stopped"), [(True, "1"), (False, "0")])
def test_threads_spin_between_steps_only_where_no_other_model_computes(
    tmp_path: Path, shares_cores: bool, is_stopped: str
) -> None:
    options = session_options(tmp_path / "model.onnx", CPU, None, shares_cores)
    assert options.get_session_config_entry("session.force_spinning_stop") == is_stopped


def test_bfloat16_is_bound_without_numpy() -> None:
    cast = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    x = helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])
    model = helper.make_model(
        helper.make_graph([cast], "cast", [x], [y]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given, found = torch.tensor([1.5, -2.0, 3e38]).bfloat16(), torch.zeros(3)
    binding = session.io_binding()
    bind_tensor(binding.bind_input, "x", given)
    bind_tensor(binding.bind_output, "y", found)
    session.run_with_iobinding(binding)
    assert torch.equal(found, given.float())
