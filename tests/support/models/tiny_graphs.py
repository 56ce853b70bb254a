"""A random Llama and its ONNX graphs in every precision."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from transformers import LlamaConfig, LlamaForCausalLM

from export.graph.half_precision import to_half
from export.graph.quantize import WeightOnly, quantize_weights
from export.graph.surgery import save_onnx
from export.graph.trace import export_onnx

VOCAB_SIZE = 300
MAX_POSITIONS = 256
HALVES = ("float16", "bfloat16")
# Two layers whose matrices are whole blocks of 128 weights, as quantizers want them.
TINY_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def save_tiny_graphs(folder: Path) -> None:
    """Write the model to a folder, its graphs to `fp32/`, `int8/`, `float16/`, `bfloat16/` in it.

    `half_logits/` has those of another exporter: float16 where ours are float32.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=MAX_POSITIONS,
        **TINY_SHAPE,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # all ones, they would be one initializer and some Identity nodes
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    for name in ("fp32", "int8", "half_logits", *HALVES):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text((folder / "config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporters warn about themselves
        path = export_onnx(model, folder / "fp32", max_model_len=MAX_POSITIONS)
        # Blocks of 128, as shipped: with 32 a lone row rounds like a pair, and proves nothing.
        save_onnx(quantize_weights(onnx.load(path), WeightOnly(8, 128)), folder / "int8")
    for method in HALVES:
        save_onnx(to_half(onnx.load(path), method), folder / method)
    save_onnx(_with_half_logits(onnx.load(path)), folder / "half_logits")


def _with_half_logits(model: onnx.ModelProto) -> onnx.ModelProto:
    """Another exporter's habit: logits in the type of the activations."""
    (head,) = [node for node in model.graph.node if "logits" in node.output]
    head.output[0] = "logits_float32"
    cast = helper.make_node("Cast", ["logits_float32"], ["logits"], to=TensorProto.FLOAT16)
    model.graph.node.append(cast)
    (logits,) = [value for value in model.graph.output if value.name == "logits"]
    logits.type.tensor_type.elem_type = TensorProto.FLOAT16
    return model
