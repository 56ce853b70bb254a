from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnxruntime import InferenceSession, SessionOptions
from transformers import AutoModelForCausalLM

from bundle.hashing import hash_file
from export.graph.calibration import text_feeds
from export.graph.grid_graph import read_grid_weights
from export.graph.quantize import (
    WeightOnly,
    float_matmuls,
    pack_by_node,
    quantize_trained,
    quantize_variant,
    quantize_weights,
    quantized_node_counts,
    split_by_module,
)
from export.graph.surgery import LOGIT_ROWS, load_untied
from export.graph.trace import export_onnx
from export.run.errors import ExportError
from export.run.settings import GatesConfig
from export.run.variants import (
    DynamicVariant,
    GridConfig,
    HalfVariant,
    StaticVariant,
    WeightOnlyVariant,
)
from export.student.grid import BlockGrid, GridWeight, round_to_nearest
from export.teacher.examples import Example
from serve.models.onnx_backend import OnnxBackend
from tests.support.random_models import random_examples, random_model

NUM_LAYERS = 5
NUM_PRODUCTS = 5 * NUM_LAYERS + 1
NUM_INPUTS = 4 * NUM_LAYERS + 1  # gate and up read the same
BODY, HEAD = "/model/layers.0/mlp/down_proj/MatMul", "/lm_head/MatMul"

FINE4, FINE8 = GridConfig(bits=4, block_size=16), GridConfig(bits=8, block_size=16)
COARSE8 = GridConfig(bits=8, block_size=64)
HEAD8 = {"lm_head": FINE8}
TRAINED = WeightOnlyVariant(
    bits=4, block_size=32, accuracy_level=0, overrides=HEAD8 | {"qkv_proj": FINE4}
)
VARIANTS: dict[str, Any] = {
    "rtn4": WeightOnlyVariant(bits=4, block_size=32, accuracy_level=0),
    "rtn8": WeightOnlyVariant(bits=8, block_size=32),
    "asymmetric": WeightOnlyVariant(bits=8, block_size=32, symmetric=False),
    "head8": WeightOnlyVariant(
        bits=4, block_size=32, accuracy_level=0, overrides=HEAD8 | {"down_proj": FINE4}
    ),
    "hqq": WeightOnlyVariant(
        method="hqq", bits=4, block_size=32, overrides={"qkv_proj": FINE4, "lm_head": FINE4}
    ),
    "gptq4": WeightOnlyVariant(method="gptq", bits=4, block_size=32, accuracy_level=0),
    "gptq8": WeightOnlyVariant(
        method="gptq", bits=8, block_size=32, overrides=HEAD8 | {"o_proj": COARSE8}
    ),
    "dynamic": DynamicVariant(method="dynamic"),
    "per_tensor": DynamicVariant(method="dynamic", per_channel=False),
    "static": StaticVariant(method="static"),
    "entropy": StaticVariant(method="static", calibration="entropy"),
    "percentile": StaticVariant(method="static", calibration="percentile", per_channel=False),
    "float16": HalfVariant(method="float16"),
    "bfloat16": HalfVariant(method="bfloat16"),
}
RUNNABLE = [name for name in VARIANTS if name != "bfloat16"]


@pytest.fixture(scope="module")
def texts() -> list[Example]:
    return random_examples([(8, 20), (5, 30), (20, 11), (2, 25)] * 4)


@pytest.fixture(scope="module")
def held_out() -> list[Example]:
    return random_examples([(8, 20), (5, 30), (20, 11), (2, 25)], seed=1)


@pytest.fixture(scope="module")
def variants(
    exported_llama: Any, texts: list[Example], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Every variant of the same tied graph, and `fp32` itself."""
    source: Path = exported_llama.variants["fp32"]
    root = tmp_path_factory.mktemp("variants")
    for name, config in VARIANTS.items():
        quantize_variant(source, root / name, config, texts)
        shutil.copy(source / "config.json", root / name)
    return {"fp32": source, **{name: root / name for name in VARIANTS}}


def load_graph(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "model.onnx")


def named_node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (node,) = [node for node in model.graph.node if node.name == name]
    return node


def attributes(node: onnx.NodeProto) -> dict[str, int]:
    return {a.name: a.i for a in node.attribute}


def arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def float_weight(model: onnx.ModelProto, name: str) -> torch.Tensor:
    """The weight of a MatMul, `(N, K)`."""
    return torch.from_numpy(arrays(model)[named_node(model, name).input[1]].T.copy())


def train_on_grid(student: Any) -> dict[str, GridWeight]:
    """Put every linear layer on the grid of `TRAINED`, as training on it does; by module name.

    The scales are those of rounding, so that rounding can find them again.
    """
    weights = {}
    for name, module in list(student.named_modules()):
        if isinstance(module, torch.nn.Linear):
            linear = name.rpartition(".")[2]
            is_packed = linear in ("q_proj", "k_proj", "v_proj")
            grid = TRAINED.grid_of("qkv_proj" if is_packed else linear)
            block_grid = BlockGrid(grid.bits, grid.block_size)
            weights[name] = round_to_nearest(module.weight.detach(), block_grid)
            module.weight = torch.nn.Parameter(weights[name].dequantize())
    return weights


def tokens(example: Example) -> list[int]:
    return [*example.prompt_token_ids, *example.completion_token_ids]


def logprobs(folder: Path, examples: list[Example]) -> torch.Tensor:
    """Run each example alone; `(all positions, V)`."""
    backend = OnnxBackend.load(folder, device="cpu", max_num_seqs=2, max_model_len=64)
    logits = [backend.forward(0, [tokens(e)], [0], [list(range(len(e)))]).clone() for e in examples]
    return torch.cat(logits).log_softmax(-1)


def kl(reference: Path, variant: Path, examples: list[Example]) -> float:
    """KL(reference ‖ variant), mean over all positions, nats."""
    p, q = logprobs(reference, examples), logprobs(variant, examples)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def open_session(model: onnx.ModelProto) -> InferenceSession:
    options = SessionOptions()
    options.log_severity_level = 3
    return InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


# --- what is quantized


NBITS = {"MatMulNBits": NUM_PRODUCTS}
DYNAMIC = {"DynamicQuantizeLinear": NUM_INPUTS, "MatMulInteger": NUM_PRODUCTS}
STATIC = {"QuantizeLinear": NUM_INPUTS, "DequantizeLinear": NUM_INPUTS + NUM_PRODUCTS}


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        *((name, NBITS) for name in VARIANTS if type(VARIANTS[name]) is WeightOnlyVariant),
        *((name, DYNAMIC) for name in ("dynamic", "per_tensor")),
        *((name, STATIC) for name in ("static", "entropy", "percentile")),
        *((name, {}) for name in ("fp32", "float16", "bfloat16")),
    ],
)
def test_every_matrix_product_is_quantized(
    variants: dict[str, Path], name: str, counts: dict[str, int]
) -> None:
    model = load_graph(variants[name])
    assert quantized_node_counts(model) == counts
    assert len(float_matmuls(model)) == (0 if counts else NUM_PRODUCTS)


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_no_float_matmul_is_left_in_any_architecture(exported: Any, variant: str) -> None:
    model = load_graph(exported.variants[variant])
    assert quantized_node_counts(model) == NBITS
    assert not [n for n in model.graph.node if n.op_type in ("MatMul", "FusedMatMul", "Gemm")]


def test_float_matmuls_are_named(exported: Any) -> None:
    names = float_matmuls(load_untied(exported.variants["fp32"]))
    assert len(names) == NUM_PRODUCTS
    assert HEAD in names


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_block_size_and_accuracy_level_are_those_of_the_recipe(
    exported_llama: Any, texts: list[Example], tmp_path: Path, method: str
) -> None:
    config = WeightOnlyVariant(method=method, bits=8, block_size=64, accuracy_level=1)
    quantize_variant(exported_llama.variants["fp32"], tmp_path, config, texts)
    for node in load_graph(tmp_path).graph.node:
        if node.op_type == "MatMulNBits":
            found = attributes(node)
            assert (found["bits"], found["block_size"], found["accuracy_level"]) == (8, 64, 1)


@pytest.mark.parametrize(
    ("name", "body", "others"),
    [
        ("rtn4", (4, 32), {}),
        ("head8", (4, 32), {"lm_head": (8, 16), "down_proj": (4, 16)}),
        ("hqq", (4, 32), {"qkv_proj": (4, 16), "lm_head": (4, 16)}),
        ("gptq8", (8, 32), {"lm_head": (8, 16), "o_proj": (8, 64)}),
    ],
)
def test_linear_layers_have_grids_of_their_own(
    variants: dict[str, Path], name: str, body: tuple[int, int], others: dict[str, Any]
) -> None:
    nodes = [n for n in load_graph(variants[name]).graph.node if n.op_type == "MatMulNBits"]
    assert len(nodes) == NUM_PRODUCTS
    for node in nodes:
        found, linear = attributes(node), node.name.split("/")[-2]
        assert (found["bits"], found["block_size"]) == others.get(linear, body), node.name


@pytest.mark.parametrize(
    ("name", "dtype"), [("rtn8", None), ("asymmetric", np.uint8), ("hqq", np.float32)]
)
def test_zero_points(variants: dict[str, Path], name: str, dtype: Any) -> None:
    model = load_graph(variants[name])
    head = named_node(model, f"{HEAD}_Q{4 if name == 'hqq' else 8}")
    assert len(head.input) == (3 if dtype is None else 4)
    assert dtype is None or arrays(model)[head.input[3]].dtype == dtype


@pytest.mark.parametrize(("name", "is_per_channel"), [("dynamic", True), ("per_tensor", False)])
def test_dynamic_weights_are_int8(
    variants: dict[str, Path], name: str, is_per_channel: bool
) -> None:
    model = load_graph(variants[name])
    values = arrays(model)
    (head,) = [n for n in model.graph.node if n.op_type == "MatMulInteger" and HEAD in n.name]
    assert values[head.input[1]].dtype == np.int8
    scales = values[head.input[1].replace("_quantized", "_scale")]
    assert scales.size == (97 if is_per_channel else 1)


@pytest.mark.parametrize("name", ["dynamic", "static", "hqq", "gptq8"])
def test_attention_norms_and_cache_stay_float(variants: dict[str, Path], name: str) -> None:
    model, source = load_graph(variants[name]), load_graph(variants["fp32"])

    def untouched(model: onnx.ModelProto) -> list[Any]:
        kinds = ("GroupQueryAttention", "SimplifiedLayerNormalization")
        return [n.attribute for n in model.graph.node if n.op_type.endswith(kinds)]

    assert untouched(model) == untouched(source)
    assert {v.name: v.type for v in (*model.graph.input, *model.graph.output)} == {
        v.name: v.type for v in (*source.graph.input, *source.graph.output)
    }


# --- the folder


@pytest.mark.parametrize("name", list(VARIANTS))
def test_weights_lie_beside_the_graph_and_nothing_else_is_left(
    variants: dict[str, Path], name: str
) -> None:
    files = {path.name for path in variants[name].iterdir()}
    assert files == {"model.onnx", "model.onnx.data", "config.json"}
    smallest = {"float16": 0.5, "bfloat16": 0.5}.get(name, 0.2)
    sizes = [(variants[n] / "model.onnx.data").stat().st_size for n in ("fp32", name)]
    assert smallest * sizes[0] < sizes[1] < 0.75 * sizes[0]


@pytest.mark.parametrize("name", ["rtn8", "gptq8", "dynamic", "static", "float16"])
def test_source_is_left_as_it_was(
    exported_llama: Any, texts: list[Example], tmp_path: Path, name: str
) -> None:
    source: Path = exported_llama.variants["fp32"]
    before = {path.name: hash_file(path) for path in source.iterdir()}
    quantize_variant(source, tmp_path / "new" / "folder", VARIANTS[name], texts)
    assert {path.name: hash_file(path) for path in source.iterdir()} == before


@pytest.mark.parametrize("name", ["hqq", "dynamic", "percentile"])
def test_quantizing_says_nothing(
    exported_llama: Any,
    texts: list[Example],
    tmp_path: Path,
    name: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """onnxruntime logs and prints several lines per node, between the stages of an export."""
    with caplog.at_level(logging.INFO):
        quantize_variant(exported_llama.variants["fp32"], tmp_path, VARIANTS[name], texts)
        logging.getLogger("after").warning("heard again")
    assert caplog.messages == ["heard again"]
    assert "".join(capfd.readouterr()) == ""


# --- the grid


def test_codes_and_scales_of_plain_rounding_are_read_back(
    exported_llama: Any, variants: dict[str, Path]
) -> None:
    source = load_untied(exported_llama.variants["fp32"])
    read = read_grid_weights(load_graph(variants["rtn4"]))
    assert read.keys() == set(float_matmuls(source))
    for name, weight in read.items():
        expected = round_to_nearest(float_weight(source, name), BlockGrid(4, 32))
        assert torch.equal(weight.codes, expected.codes)
        assert torch.equal(weight.scales, expected.scales)


@pytest.mark.parametrize("name", ["rtn4", "rtn8"])
def test_quantizing_again_changes_nothing(
    exported_llama: Any, variants: dict[str, Path], name: str
) -> None:
    config = VARIANTS[name]
    once = read_grid_weights(load_graph(variants[name]))
    source = load_untied(exported_llama.variants["fp32"])
    for tensor in source.graph.initializer:
        for node, weight in once.items():
            if tensor.name == named_node(source, node).input[1]:
                dequantized = np.ascontiguousarray(weight.dequantize().T.numpy())
                tensor.CopyFrom(numpy_helper.from_array(dequantized, tensor.name))
    twice = read_grid_weights(quantize_weights(source, WeightOnly(config.bits, config.block_size)))
    assert len(twice) == NUM_PRODUCTS
    for node, weight in once.items():
        assert torch.equal(weight.codes, twice[node].codes)
        assert torch.equal(weight.scales, twice[node].scales)


@pytest.mark.parametrize("architecture", ["llama", "qwen2-untied", "qwen3"])
def test_trained_student_is_in_the_graph_bit_for_bit(
    export_once: Callable[[str], Any], held_out: list[Example], tmp_path: Path, architecture: str
) -> None:
    exported = export_once(architecture)
    student = AutoModelForCausalLM.from_pretrained(exported.student_dir)
    weights = train_on_grid(student)
    quantize_trained(exported.variants["fp32"], tmp_path, TRAINED, weights)
    model = load_graph(tmp_path)
    assert quantized_node_counts(model) == NBITS

    read = split_by_module(
        read_grid_weights(model), lambda name: student.get_submodule(name).out_features
    )
    assert read.keys() == weights.keys()
    for name, weight in read.items():
        assert weight.grid == weights[name].grid
        assert torch.equal(weight.codes, weights[name].codes)
        assert torch.equal(weight.scales, weights[name].scales)

    shutil.copy(exported.variants["fp32"] / "config.json", tmp_path)
    with torch.inference_mode():
        expected = [student(torch.tensor([tokens(e)])).logits[0] for e in held_out]
    torch.testing.assert_close(
        logprobs(tmp_path, held_out), torch.cat(expected).log_softmax(-1), atol=1e-3, rtol=1e-4
    )


def test_quantizing_a_trained_student_again_changes_nothing(
    exported_llama: Any, tmp_path: Path
) -> None:
    """Rounding its float graph finds the codes and scales that it was trained to."""
    student = random_model()
    weights = train_on_grid(student)
    student.config.tie_word_embeddings = False
    source, trained, rounded = (tmp_path / name for name in ("source", "trained", "rounded"))
    source.mkdir()
    export_onnx(student, source, max_model_len=64)
    quantize_trained(source, trained, TRAINED, weights)
    quantize_variant(source, rounded, TRAINED, [])
    expected, found = (read_grid_weights(load_graph(folder)) for folder in (trained, rounded))
    assert len(expected) == NUM_PRODUCTS
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert weight.grid == found[name].grid
        assert torch.equal(weight.codes, found[name].codes)
        assert torch.equal(weight.scales, found[name].scales)


def test_every_linear_layer_must_have_been_trained(exported_llama: Any, tmp_path: Path) -> None:
    weights = train_on_grid(random_model())
    del weights["model.layers.2.self_attn.k_proj"]
    with pytest.raises(AssertionError, match=r"model\.layers\.2\.self_attn\.k_proj"):
        quantize_trained(exported_llama.variants["fp32"], tmp_path, TRAINED, weights)


def test_weights_are_split_and_packed_again(variants: dict[str, Path]) -> None:
    student, weights = random_model(), read_grid_weights(load_graph(variants["gptq8"]))
    split = split_by_module(weights, lambda name: student.get_submodule(name).out_features)
    assert len(split) == 7 * NUM_LAYERS + 1
    assert {name for name in split if name.startswith("model.layers.1.self_attn")} == {
        f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"
    }
    packed = pack_by_node(split, weights)
    assert list(packed) == list(weights)
    for name, weight in weights.items():
        assert packed[name].grid == weight.grid
        assert torch.equal(packed[name].codes, weight.codes)
        assert torch.equal(packed[name].scales, weight.scales)


def test_weights_are_rounded_to_the_nearest_of_their_block(exported: Any) -> None:
    """Symmetric: w = code * s, code up to 127: the extreme of the other sign may lose a step."""
    weight = float_weight(load_untied(exported.variants["fp32"]), HEAD)
    read = read_grid_weights(load_graph(exported.variants["int8"]))[HEAD]
    step = read.scales.abs().repeat_interleave(32, 1)
    error = (read.dequantize() - weight).abs()
    assert (error <= 1.001 * step).all()
    assert (error <= 0.501 * step).float().mean() > 0.98


# --- what it costs


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("rtn4", 0.1, 0.8),
        ("rtn8", 1e-4, 0.02),
        ("asymmetric", 1e-4, 0.02),
        ("head8", 0.1, 0.8),
        ("hqq", 0.1, 0.8),
        ("gptq4", 0.1, 0.8),
        ("gptq8", 1e-4, 0.02),
        ("dynamic", 1e-4, 0.05),
        ("per_tensor", 1e-4, 0.1),
        ("static", 1e-4, 0.1),
        ("entropy", 1e-4, 0.1),
        ("percentile", 1e-4, 0.1),
        ("float16", 1e-8, 1e-3),
    ],
)
def test_kl_to_float(
    variants: dict[str, Path], held_out: list[Example], name: str, least: float, most: float
) -> None:
    assert least < kl(variants["fp32"], variants[name], held_out) < most


def test_gptq_costs_less_than_plain_rounding(
    variants: dict[str, Path], held_out: list[Example]
) -> None:
    gptq_kl, rtn_kl = (kl(variants["fp32"], variants[n], held_out) for n in ("gptq4", "rtn4"))
    assert gptq_kl < 0.95 * rtn_kl


@pytest.mark.parametrize("name", RUNNABLE)
def test_logits_of_all_rows_are_those_of_picked_rows(
    variants: dict[str, Path], held_out: list[Example], name: str
) -> None:
    """The If in front of the head survives, both branches of it."""
    model = load_graph(variants[name])
    session = open_session(model)
    (feed,) = text_feeds(model, held_out[:1])
    types = {i.name: np.float16 if "float16" in i.type else None for i in session.get_inputs()}
    feed = {key: value.astype(types[key] or value.dtype) for key, value in feed.items()}
    (everything,) = session.run(["logits"], feed)
    (picked,) = session.run(["logits"], {**feed, LOGIT_ROWS: np.array([3, 9, 3, 27])})
    assert everything.shape == (1, 28, 97)
    assert everything.dtype == np.float32
    # A dynamic range is that of all rows of the head's input, the picked ones only.
    tolerance = 0.2 if VARIANTS[name].method == "dynamic" else 1e-5
    np.testing.assert_allclose(picked, everything[:, [3, 9, 3, 27]], atol=tolerance)


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


@pytest.mark.parametrize("is_planted", [False, True])
def test_planted_outlier_channel_fails_the_int8_gate(
    export_to: Callable[..., Any], held_out: list[Example], tmp_path: Path, is_planted: bool
) -> None:
    model = random_model()
    if is_planted:
        plant_outlier(model)
    variants = export_to(tmp_path, model).variants
    config = WeightOnlyVariant(bits=8, block_size=32, accuracy_level=4)
    quantize_variant(variants["fp32"], tmp_path / "int8", config, [])
    shutil.copy(variants["fp32"] / "config.json", tmp_path / "int8")
    measured = kl(variants["fp32"], tmp_path / "int8", held_out)
    assert GatesConfig().quantized_kl == 0.02
    assert (measured > 0.02) is is_planted, measured


def test_planted_outlier_changes_nothing_in_float() -> None:
    model, planted, ids = random_model(), random_model(), torch.arange(10)[None]
    plant_outlier(planted)
    with torch.inference_mode():
        difference = (model(ids).logits - planted(ids).logits).abs().max()
    assert difference < 1e-3


def test_float16_runs_in_any_architecture(
    exported: Any, held_out: list[Example], tmp_path: Path
) -> None:
    quantize_variant(exported.variants["fp32"], tmp_path, VARIANTS["float16"], [])
    shutil.copy(exported.variants["fp32"] / "config.json", tmp_path)
    assert kl(exported.variants["fp32"], tmp_path, held_out) < 1e-3


# --- calibration


@pytest.mark.parametrize(
    "config",
    [
        StaticVariant(method="static", num_calibration_texts=1),
        WeightOnlyVariant(method="gptq", bits=4, block_size=32, num_calibration_texts=1),
    ],
)
def test_only_so_many_texts_calibrate(
    exported_llama: Any, texts: list[Example], tmp_path: Path, config: Any
) -> None:
    def quantized(used: list[Example], num_texts: int) -> str:
        limited = config.model_copy(update={"num_calibration_texts": num_texts})
        quantize_variant(exported_llama.variants["fp32"], tmp_path, limited, used)
        return hash_file(tmp_path / "model.onnx") + hash_file(tmp_path / "model.onnx.data")

    assert quantized(texts, 1) == quantized(texts[:1], 9) != quantized(texts, 9)


@pytest.mark.parametrize("name", ["static", "gptq4"])
def test_calibration_needs_a_text(exported_llama: Any, tmp_path: Path, name: str) -> None:
    method = VARIANTS[name].method
    with pytest.raises(ExportError, match=f"^{method}: there is no calibration text"):
        quantize_variant(exported_llama.variants["fp32"], tmp_path, VARIANTS[name], [])


# --- what cannot be had


def test_gptq_is_symmetric_only(exported_llama: Any, texts: list[Example], tmp_path: Path) -> None:
    config = WeightOnlyVariant(method="gptq", bits=4, block_size=32, symmetric=False)
    with pytest.raises(ExportError, match=r"^gptq: symmetric is false"):
        quantize_variant(exported_llama.variants["fp32"], tmp_path, config, texts)
