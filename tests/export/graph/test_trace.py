from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from transformers import Qwen2Config, Qwen2ForCausalLM

from export.graph.surgery import DATA_FILE, OPSET, check_node_count, load_untied
from export.graph.trace import export_onnx
from tests.support.random_models import random_model

NUM_LAYERS = 5
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35]


def read_graph(folder: Path) -> onnx.GraphProto:
    return onnx.load(folder / "model.onnx", load_external_data=False).graph


def open_plainly(folder: Path) -> ort.InferenceSession:
    """Open a graph as any tool would, except that the warning about `logit_rows` is not shown."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(folder / "model.onnx", options)


def first_inputs(session: ort.InferenceSession, rows: list[list[int]]) -> dict[str, np.ndarray]:
    """Return the inputs of a prefill of rows of one length, `logit_rows` not among them."""
    inputs = {"input_ids": np.array(rows), "attention_mask": np.ones_like(rows)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            shape = (len(rows), value.shape[1], 0, value.shape[3])
            inputs[value.name] = np.zeros(shape, np.float32)
    return inputs


@torch.inference_mode()
def torch_logits(folder: Path, rows: list[list[int]]) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits: np.ndarray = model(torch.tensor(rows)).logits.numpy()
    return logits


# --- the graph


@pytest.mark.parametrize("num_layers", [1, 2])
def test_graph_and_weights_are_all_that_is_written(tmp_path: Path, num_layers: int) -> None:
    export_onnx(random_model("llama", num_layers=num_layers), tmp_path, max_model_len=64)
    assert len(read_graph(tmp_path).node) == 11 * num_layers + 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", DATA_FILE]


def test_attention_is_one_operator_and_norms_are_fused(exported: Any) -> None:
    kinds = [node.op_type for node in read_graph(exported.variants["fp32"]).node]
    assert kinds.count("GroupQueryAttention") == NUM_LAYERS
    assert kinds.count("SkipSimplifiedLayerNormalization") == 2 * NUM_LAYERS
    assert kinds.count("SimplifiedLayerNormalization") == 1
    assert kinds.count("MatMul") + kinds.count("FusedMatMul") == 5 * NUM_LAYERS + 1


def test_biases_as_long_as_those_of_real_models_hinder_no_fusion(tmp_path: Path) -> None:
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


def test_inputs_and_outputs_have_the_names_of_the_ecosystem(exported: Any) -> None:
    graph = read_graph(exported.variants["fp32"])
    layers = [(i, kind) for i in range(NUM_LAYERS) for kind in ("key", "value")]
    assert [value.name for value in graph.input] == [
        "input_ids",
        "attention_mask",
        *(f"past_key_values.{i}.{kind}" for i, kind in layers),
        "logit_rows",
    ]
    assert [value.name for value in graph.output] == [
        "logits",
        *(f"present.{i}.{kind}" for i, kind in layers),
    ]


def test_opset_is_the_one_that_the_manifest_names(exported: Any) -> None:
    model = onnx.load(exported.variants["fp32"] / "model.onnx", load_external_data=False)
    assert {i.domain: i.version for i in model.opset_import}[""] == OPSET


def test_only_float32_is_exported(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="bfloat16"):
        export_onnx(random_model().bfloat16(), tmp_path, max_model_len=64)


def test_graph_with_too_many_nodes_is_refused(exported: Any) -> None:
    model = onnx.load(exported.variants["fp32"] / "model.onnx", load_external_data=False)
    num_nodes = len(model.graph.node)
    check_node_count(model, num_nodes)
    with pytest.raises(RuntimeError, match=f"has {num_nodes} nodes, at most {num_nodes - 1} "):
        check_node_count(model, num_nodes - 1)


def test_fusion_that_does_not_take_fails_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.graph.surgery.fuse_norms", lambda model: model)
    with pytest.raises(RuntimeError, match="a fusion did not take"):
        export_onnx(random_model(), tmp_path, max_model_len=64)


# --- the head


def test_without_logit_rows_all_rows_have_logits(exported: Any) -> None:
    rows = [PROMPT, PROMPT[::-1]]
    session = open_plainly(exported.variants["fp32"])
    (logits,) = session.run(["logits"], first_inputs(session, rows))
    assert logits.shape == (2, len(PROMPT), 97)
    np.testing.assert_allclose(logits, torch_logits(exported.student_dir, rows), atol=1e-4)


@pytest.mark.parametrize("wanted", [[19], [0, 9, 10, 19], [5, 5, 3]])
def test_logit_rows_picks_flattened_positions(exported: Any, wanted: list[int]) -> None:
    session = open_plainly(exported.variants["fp32"])
    inputs = first_inputs(session, [PROMPT, PROMPT[::-1]])
    (everything,) = session.run(["logits"], inputs)
    (picked,) = session.run(["logits"], {**inputs, "logit_rows": np.array(wanted)})
    assert picked.shape == (1, len(wanted), 97)
    np.testing.assert_allclose(picked[0], everything.reshape(-1, 97)[wanted], atol=1e-5)


def test_empty_logit_rows_mean_all_rows(exported: Any) -> None:
    session = open_plainly(exported.variants["fp32"])
    inputs = first_inputs(session, [PROMPT])
    (everything,) = session.run(["logits"], inputs)
    (fed,) = session.run(["logits"], {**inputs, "logit_rows": np.zeros(0, np.int64)})
    np.testing.assert_array_equal(fed, everything)


def test_tied_embedding_is_stored_once(exported: Any) -> None:
    """The file holds the parameters that transformers counts, and the rotary tables."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported.student_dir)
    rotary = 2 * 160 * (model.model.layers[0].self_attn.head_dim // 2)
    size_bytes = (exported.variants["fp32"] / DATA_FILE).stat().st_size
    embedding_bytes = 4 * model.model.embed_tokens.weight.numel()
    surplus = size_bytes - 4 * (model.num_parameters() + rotary)
    assert abs(surplus) < embedding_bytes / 2, "alignment, and norms that stay in model.onnx"


def test_load_untied_writes_the_head_out(exported: Any) -> None:
    from transformers import AutoModelForCausalLM

    graph = load_untied(exported.variants["fp32"]).graph
    (head,) = [node for node in graph.node if "logits" in node.output]
    (weight,) = [i for i in graph.initializer if i.name == head.input[1]]
    model = AutoModelForCausalLM.from_pretrained(exported.student_dir)
    np.testing.assert_array_equal(numpy_helper.to_array(weight), model.lm_head.weight.detach().T)
    assert (head.op_type, list(head.attribute)) == ("MatMul", [])


def test_export_is_the_same_twice(tmp_path: Path) -> None:
    model = random_model("llama", num_layers=2)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export_onnx(copy.deepcopy(model), tmp_path / name, max_model_len=64)
    for name in ("model.onnx", DATA_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
