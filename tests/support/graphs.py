"""ONNX graphs of tests: made, read, run and compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession, SessionOptions

from export.teacher.examples import Example
from serve.models.onnx_backend import OnnxBackend


def matmul_graph(weight: torch.Tensor) -> onnx.ModelProto:
    """A graph of a single MatMul "product" of `x` and a weight `(N, K)`, the initializer "w"."""
    num_outputs, num_inputs = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, num_inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, num_outputs])],
        [numpy_helper.from_array(np.ascontiguousarray(weight.numpy().T), "w")],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def load_graph(folder: Path, *, with_weights: bool = True) -> onnx.ModelProto:
    return onnx.load(folder / "model.onnx", load_external_data=with_weights)


def named_node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (node,) = [node for node in model.graph.node if node.name == name]
    return node


def weights_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def open_session(model: onnx.ModelProto | Path) -> InferenceSession:
    """Open a graph, or that of a folder, as any tool would, but without onnxruntime's warnings."""
    options = SessionOptions()
    options.log_severity_level = 3
    source = model / "model.onnx" if isinstance(model, Path) else model.SerializeToString()
    return InferenceSession(source, options, providers=["CPUExecutionProvider"])


def logprobs(folder: Path, examples: list[Example]) -> torch.Tensor:
    """Run each example alone; `(all positions, V)`."""
    backend = OnnxBackend.load(folder, device="cpu", max_num_seqs=2, max_model_len=64)
    rows = [(e.prompt_token_ids + e.completion_token_ids, list(range(len(e)))) for e in examples]
    logits = [backend.forward(0, [ids], [0], [wanted]).clone() for ids, wanted in rows]
    return torch.cat(logits).log_softmax(-1)


def kl(reference: Path, variant: Path, examples: list[Example]) -> float:
    """KL(reference ‖ variant), mean over all positions, nats."""
    p, q = logprobs(reference, examples), logprobs(variant, examples)
    return (p.exp() * (p - q)).sum(-1).mean().item()
