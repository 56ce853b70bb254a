from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export.config import ExportConfig, VariantConfig
from export.distill import Example
from export.evaluate import Agreement, evaluate
from export.onnx_graph import load_untied
from export.quantize import WeightOnly, float_matmuls, quantize_weights
from export.report import (
    STUDENT,
    TEACHER,
    TORCH,
    TRANSFORMERS,
    GateError,
    choose_default,
    describe_variant,
    summarize,
)
from export.speed import Speed
from serve.onnx_backend import OnnxBackend

NUM_LAYERS = 5
CONFIG = ExportConfig(
    teacher="unused",
    output_dir=Path("unused"),
    variants={"int8": VariantConfig(bits=8, block_size=32)},
)


def nodes(folder: Path, kind: str) -> list[onnx.NodeProto]:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return [node for node in graph.node if node.op_type == kind]


def attribute(node: onnx.NodeProto, name: str) -> int:
    (value,) = [a.i for a in node.attribute if a.name == name]
    return int(value)


def agreements(
    variants: dict[str, Path], examples: list[Example]
) -> dict[tuple[str, str], Agreement]:
    """Measure every variant against fp32, as the pipeline does."""
    size = {"device": "cpu", "max_num_seqs": 4, "max_model_len": 64}
    backends = {name: OnnxBackend.load(folder, **size) for name, folder in variants.items()}
    return evaluate(backends, ("fp32",), examples, lambda done, total: None)


@pytest.fixture(scope="session")
def examples(make_examples: Callable[..., list[Example]]) -> list[Example]:
    return make_examples([(8, 20), (5, 30), (20, 11), (2, 25)])


# --- what is quantized


@pytest.mark.parametrize(("variant", "bits"), [("int8", 8), ("int4", 4)])
def test_no_float_matmul_is_left_and_the_head_is_quantized(
    exported: Any, variant: str, bits: int
) -> None:
    folder = exported.variants[variant]
    quantized = nodes(folder, "MatMulNBits")
    assert not any(nodes(folder, kind) for kind in ("MatMul", "FusedMatMul", "Gemm"))
    assert len(quantized) == 5 * NUM_LAYERS + 1
    assert any("logits" in node.output for node in quantized)
    assert {attribute(node, "bits") for node in quantized} == {bits}


def test_block_size_and_accuracy_level_are_those_of_the_recipe(exported: Any) -> None:
    model = quantize_weights(load_untied(exported.variants["fp32"]), WeightOnly(8, 64, 1))
    quantized = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert {attribute(node, "block_size") for node in quantized} == {64}
    assert {attribute(node, "accuracy_level") for node in quantized} == {1}


def test_float_matmuls_are_named(exported: Any) -> None:
    names = float_matmuls(load_untied(exported.variants["fp32"]))
    assert len(names) == 5 * NUM_LAYERS + 1
    assert "/lm_head/MatMul" in names
    assert float_matmuls(onnx.load(exported.variants["int8"] / "model.onnx")) == []


def test_weights_are_rounded_to_the_nearest_of_their_block(exported: Any) -> None:
    """Symmetric: w = (q - 128) s, q up to 255: the extreme of the other sign may lose a step."""
    fp32 = load_untied(exported.variants["fp32"])
    weights = {i.name: numpy_helper.to_array(i) for i in fp32.graph.initializer}
    (weight,) = [weights[n.input[1]] for n in fp32.graph.node if "logits" in n.output]
    model = onnx.load(exported.variants["int8"] / "model.onnx")
    values = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    (head,) = [node for node in model.graph.node if "logits" in node.output]
    packed, scales = values[head.input[1]], values[head.input[2]].reshape(97, -1)
    restored = (packed.reshape(97, -1, 32).astype(np.float32) - 128) * scales[..., None]
    error, step = np.abs(restored - weight.T.reshape(97, -1, 32)), np.abs(scales)[..., None]
    assert (error <= 1.001 * step).all()
    assert (error <= 0.501 * step).mean() > 0.98


def test_quantizing_says_nothing(exported: Any, caplog: pytest.LogCaptureFixture) -> None:
    """onnxruntime logs two lines per node, between the stages of an export."""
    with caplog.at_level(logging.INFO):
        quantize_weights(load_untied(exported.variants["fp32"]), WeightOnly(8, 32))
    assert caplog.messages == []


# --- what it costs


def test_int8_is_close_to_float_and_int4_is_not(exported: Any, examples: list[Example]) -> None:
    measured = agreements(exported.variants, examples)
    int8, int4 = measured["fp32", "int8"], measured["fp32", "int4"]
    assert 0 < int8.forward_kl < CONFIG.gates.quantized_kl
    assert int8.argmax_agreement > 0.85
    assert int4.forward_kl > CONFIG.gates.quantized_kl


def plant_outlier(model: Any, channel: int = 5, factor: float = 1000.0) -> None:
    """Scale one hidden channel behind every norm and take it back in the weights that read it.

    In float nothing changes; int8 activations have to spread 127 steps over a thousandfold range.
    """
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            layer.input_layernorm.weight[channel] *= factor
            layer.post_attention_layernorm.weight[channel] *= factor
            readers = (attention.q_proj, attention.k_proj, attention.v_proj)
            for linear in (*readers, mlp.gate_proj, mlp.up_proj):
                linear.weight[:, channel] /= factor


def describe(variants: dict[str, Path], examples: list[Example]) -> dict[str, Any]:
    """Judge fp32 and int8 as the pipeline does; teacher and student are the fp32 graph here."""
    measured = agreements(variants, examples)
    quality = {
        (reference, name): measured["fp32", "int8"] if name == "int8" else Agreement(0.0, 1.0, 86)
        for reference in (TEACHER, STUDENT)
        for name in variants
    }
    speed = {name: Speed(0.1, 10.0) for name in ("fp32", TORCH, TRANSFORMERS)}
    summary = summarize(quality, speed | {"int8": Speed(0.1, 99.0)}, len(examples))
    parity = {"max_mean_kl": 1e-9, "max_logit_difference": 1e-5, "num_positions": 9}
    (variants["fp32"] / "parity.json").write_text(json.dumps(parity))
    return {
        name: describe_variant(name, folder, CONFIG, summary) for name, folder in variants.items()
    }


@pytest.mark.parametrize("is_planted", [False, True])
def test_planted_outlier_channel_fails_the_int8_gate(
    make_model: Callable[..., Any],
    export_to: Callable[..., Any],
    examples: list[Example],
    tmp_path: Path,
    is_planted: bool,
) -> None:
    model = make_model()
    if is_planted:
        plant_outlier(model)
    exported = export_to(tmp_path, model, int8=WeightOnly(8, 32))
    described = describe(exported.variants, examples)
    gates = {gate.name: gate for gate in described["int8"].gates}
    gate = gates["kl_to_float_student"]
    assert gate.threshold == 0.02
    assert gate.passed is not is_planted, gate.measured
    assert choose_default(described) == ("fp32" if is_planted else "int8")


def test_planted_outlier_alone_leaves_no_default(
    make_model: Callable[..., Any],
    export_to: Callable[..., Any],
    examples: list[Example],
    tmp_path: Path,
) -> None:
    model = make_model()
    plant_outlier(model)
    exported = export_to(tmp_path, model, int8=WeightOnly(8, 32))
    described = describe(exported.variants, examples)
    with pytest.raises(GateError, match=r"int8: kl_to_float_student .* exceeds 0.02"):
        choose_default({"int8": described["int8"]})


def test_planted_outlier_changes_nothing_in_float(make_model: Callable[..., Any]) -> None:
    model, planted, ids = make_model(), make_model(), torch.arange(10)[None]
    plant_outlier(planted)
    with torch.inference_mode():
        difference = (model(ids).logits - planted(ids).logits).abs().max()
    assert difference < 1e-3
