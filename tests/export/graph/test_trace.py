from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnxruntime import InferenceSession
from transformers import Qwen2Config, Qwen2ForCausalLM

from export.graph.surgery import DATA_FILE, OPSET, load_untied
from export.graph.trace import export_onnx
from export.teacher.model_files import load_model
from tests.support.graphs import load_graph, open_session
from tests.support.random_models import NUM_LAYERS, random_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35]


def first_inputs(session: InferenceSession, rows: list[list[int]]) -> dict[str, np.ndarray]:
    """Return the inputs of a prefill of rows of one length, `logit_rows` not among them."""
    inputs = {"input_ids": np.array(rows), "attention_mask": np.ones_like(rows)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            shape = (len(rows), value.shape[1], 0, value.shape[3])
            inputs[value.name] = np.zeros(shape, np.float32)
    return inputs


@torch.inference_mode()
def torch_logits(folder: Path, rows: list[list[int]]) -> np.ndarray:
    logits: np.ndarray = load_model(folder, torch.float32)(torch.tensor(rows)).logits.numpy()
    return logits


# --- the graph


def test_export_writes_graph_and_weights_alone(tmp_path: Path) -> None:
    export_onnx(random_model("llama", num_layers=1), tmp_path, max_model_len=64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", DATA_FILE]


def test_export_of_biases_as_long_as_real_ones_is_fused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2}
    config = Qwen2Config(vocab_size=40, num_attention_heads=4, num_key_value_heads=2, **sizes)
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    graph = onnx.load(export_onnx(model, tmp_path, max_model_len=64)).graph
    biases = [i.dims for i in graph.initializer if list(i.dims) == [256]]
    assert len(biases) == 2, "1024 bytes: SmolLM2's layers have none, Qwen2.5's 8 KiB"
    assert [node.op_type for node in graph.node].count("SkipSimplifiedLayerNormalization") == 4


def test_export_has_fused_operators_and_the_names_of_the_ecosystem(exported: Any) -> None:
    model = load_graph(exported.variants["fp32"], with_weights=False)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("GroupQueryAttention") == NUM_LAYERS
    assert kinds.count("SkipSimplifiedLayerNormalization") == 2 * NUM_LAYERS
    assert kinds.count("SimplifiedLayerNormalization") == 1
    assert kinds.count("MatMul") + kinds.count("FusedMatMul") == 5 * NUM_LAYERS + 1
    layers = [(i, kind) for i in range(NUM_LAYERS) for kind in ("key", "value")]
    past = [f"past_key_values.{i}.{kind}" for i, kind in layers]
    inputs = ["input_ids", "attention_mask", *past, "logit_rows"]
    assert [value.name for value in model.graph.input] == inputs
    outputs = ["logits", *(f"present.{i}.{kind}" for i, kind in layers)]
    assert [value.name for value in model.graph.output] == outputs
    assert {i.domain: i.version for i in model.opset_import}[""] == OPSET


def test_export_of_bfloat16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="bfloat16"):
        export_onnx(random_model().bfloat16(), tmp_path, max_model_len=64)


def test_export_where_a_fusion_does_not_take_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.graph.surgery.fuse_norms", lambda model: model)
    with pytest.raises(RuntimeError, match="a fusion did not take"):
        export_onnx(random_model(), tmp_path, max_model_len=64)


# --- the head


def test_exported_logits_are_of_all_rows_or_of_those_that_logit_rows_picks(exported: Any) -> None:
    """By flattened position; none means all, as if the input were not there."""
    rows = [PROMPT, PROMPT[::-1]]
    session = open_session(exported.variants["fp32"])
    inputs = first_inputs(session, rows)
    (everything,) = session.run(["logits"], inputs)
    assert everything.shape == (2, len(PROMPT), 97)
    np.testing.assert_allclose(everything, torch_logits(exported.student_dir, rows), atol=1e-4)
    for wanted in ([19], [0, 9, 10, 19], [5, 5, 3]):
        (picked,) = session.run(["logits"], {**inputs, "logit_rows": np.array(wanted)})
        assert picked.shape == (1, len(wanted), 97)
        np.testing.assert_allclose(picked[0], everything.reshape(-1, 97)[wanted], atol=1e-5)
    (fed,) = session.run(["logits"], {**inputs, "logit_rows": np.zeros(0, np.int64)})
    np.testing.assert_array_equal(fed, everything)


def test_export_stores_a_tied_embedding_once(exported: Any) -> None:
    """The file holds the parameters that transformers counts, and the rotary tables."""

    model = load_model(exported.student_dir, torch.float32)
    rotary = 2 * 160 * (model.model.layers[0].self_attn.head_dim // 2)
    size_bytes = (exported.variants["fp32"] / DATA_FILE).stat().st_size
    embedding_bytes = 4 * model.model.embed_tokens.weight.numel()
    surplus = size_bytes - 4 * (model.num_parameters() + rotary)
    assert abs(surplus) < embedding_bytes / 2, "alignment, and norms that stay in model.onnx"


def test_load_untied_writes_the_head_out(exported: Any) -> None:

    graph = load_untied(exported.variants["fp32"]).graph
    (head,) = [node for node in graph.node if "logits" in node.output]
    (weight,) = [i for i in graph.initializer if i.name == head.input[1]]
    model = load_model(exported.student_dir, torch.float32)
    np.testing.assert_array_equal(numpy_helper.to_array(weight), model.lm_head.weight.detach().T)
    assert (head.op_type, list(head.attribute)) == ("MatMul", [])


def test_export_is_the_same_twice(tmp_path: Path) -> None:
    model = random_model("llama", num_layers=2)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export_onnx(copy.deepcopy(model), tmp_path / name, max_model_len=64)
    for name in ("model.onnx", DATA_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
