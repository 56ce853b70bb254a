from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from bundle.hashing import hash_file
from export.graph.calibration import text_feeds
from export.graph.quantize import (
    float_matmuls,
    quantize_variant,
    quantized_node_counts,
)
from export.graph.surgery import LOGIT_ROWS, load_untied
from export.run.errors import ExportError
from export.run.settings import GatesConfig
from export.run.variants import (
    DynamicVariant,
    GridConfig,
    HalfVariant,
    StaticVariant,
    WeightOnlyVariant,
)
from export.student.grid import BlockGrid
from export.teacher.examples import Example
from tests.support.export.grids import read_grid_weights, round_to_nearest
from tests.support.graphs import kl, load_graph, named_node, open_session, weights_of
from tests.support.random_models import export_model, random_examples, random_model

TEXTS = random_examples([(8, 20), (5, 30), (20, 11), (2, 25)] * 4)
HELD_OUT = random_examples([(8, 20), (5, 30), (20, 11), (2, 25)], seed=1)
NUM_LAYERS = 5
NUM_PRODUCTS = 5 * NUM_LAYERS + 1
NUM_INPUTS = 4 * NUM_LAYERS + 1  # gate and up read the same
BODY, HEAD = "/model/layers.0/mlp/down_proj/MatMul", "/lm_head/MatMul"

FINE4, FINE8 = GridConfig(bits=4, block_size=16), GridConfig(bits=8, block_size=16)
COARSE8 = GridConfig(bits=8, block_size=64)
HEAD8 = {"lm_head": FINE8}
VARIANTS: dict[str, Any] = {
    "rtn4": WeightOnlyVariant(bits=4, block_size=32, accuracy_level=0),
    "rtn8": WeightOnlyVariant(bits=8, block_size=64, accuracy_level=1),
    "asymmetric": WeightOnlyVariant(bits=8, block_size=32, symmetric=False),
    "head8": WeightOnlyVariant(
        bits=4, block_size=32, accuracy_level=0, overrides=HEAD8 | {"down_proj": FINE4}
    ),
    "hqq": WeightOnlyVariant(
        method="hqq", bits=4, block_size=32, overrides={"qkv_proj": FINE4, "lm_head": FINE4}
    ),
    "gptq4": WeightOnlyVariant(method="gptq", bits=4, block_size=32, accuracy_level=0),
    "gptq8": WeightOnlyVariant(
        method="gptq",
        bits=8,
        block_size=32,
        accuracy_level=2,
        overrides=HEAD8 | {"o_proj": COARSE8},
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
def source_hashes(exported_llama: Any) -> dict[str, str]:
    """Of the float graph's files before anything is made of it."""
    return {path.name: hash_file(path) for path in exported_llama.variants["fp32"].iterdir()}


@pytest.fixture(scope="module")
def variants(
    exported_llama: Any, source_hashes: object, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Every variant of the same tied graph, and `fp32` itself."""
    source: Path = exported_llama.variants["fp32"]
    root = tmp_path_factory.mktemp("variants") / "new" / "folders"
    for name, config in VARIANTS.items():
        quantize_variant(source, root / name, config, TEXTS)
        shutil.copy(source / "config.json", root / name)
    return {"fp32": source, **{name: root / name for name in VARIANTS}}


def attributes(node: onnx.NodeProto) -> dict[str, int]:
    return {a.name: a.i for a in node.attribute}


def float_weight(model: onnx.ModelProto, name: str) -> torch.Tensor:
    """The weight of a MatMul, `(N, K)`."""
    return torch.from_numpy(weights_of(model)[named_node(model, name).input[1]].T.copy())


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
def test_quantize_takes_every_matrix_product(
    variants: dict[str, Path], name: str, counts: dict[str, int]
) -> None:
    model = load_graph(variants[name])
    assert quantized_node_counts(model) == counts
    assert len(float_matmuls(model)) == (0 if counts else NUM_PRODUCTS)


@pytest.mark.parametrize(
    ("name", "accuracy_level", "body", "others"),
    [
        ("rtn4", 0, (4, 32), {}),
        ("rtn8", 1, (8, 64), {}),
        ("head8", 0, (4, 32), {"lm_head": (8, 16), "down_proj": (4, 16)}),
        ("hqq", 0, (4, 32), {"qkv_proj": (4, 16), "lm_head": (4, 16)}),
        ("gptq8", 2, (8, 32), {"lm_head": (8, 16), "o_proj": (8, 64)}),
    ],
)
def test_quantize_gives_linear_layers_the_grids_and_accuracy_level_of_the_recipe(
    variants: dict[str, Path],
    name: str,
    accuracy_level: int,
    body: tuple[int, int],
    others: dict[str, Any],
) -> None:
    nodes = [n for n in load_graph(variants[name]).graph.node if n.op_type == "MatMulNBits"]
    assert len(nodes) == NUM_PRODUCTS
    for node in nodes:
        found, linear = attributes(node), node.name.split("/")[-2]
        assert (found["bits"], found["block_size"]) == others.get(linear, body), node.name
        assert found.get("accuracy_level", 0) == accuracy_level


@pytest.mark.parametrize(
    ("name", "dtype"), [("rtn8", None), ("asymmetric", np.uint8), ("hqq", np.float32)]
)
def test_quantize_gives_asymmetric_grids_their_zero_points(
    variants: dict[str, Path], name: str, dtype: Any
) -> None:
    model = load_graph(variants[name])
    head = named_node(model, f"{HEAD}_Q{4 if name == 'hqq' else 8}")
    assert len(head.input) == (3 if dtype is None else 4)
    assert dtype is None or weights_of(model)[head.input[3]].dtype == dtype


@pytest.mark.parametrize(("name", "is_per_channel"), [("dynamic", True), ("per_tensor", False)])
def test_quantize_dynamic_gives_int8_weights(
    variants: dict[str, Path], name: str, is_per_channel: bool
) -> None:
    model = load_graph(variants[name])
    values = weights_of(model)
    (head,) = [n for n in model.graph.node if n.op_type == "MatMulInteger" and HEAD in n.name]
    assert values[head.input[1]].dtype == np.int8
    scales = values[head.input[1].replace("_quantized", "_scale")]
    assert scales.size == (97 if is_per_channel else 1)


@pytest.mark.parametrize("name", ["dynamic", "static", "hqq", "gptq8"])
def test_quantize_leaves_attention_norms_and_cache_in_float(
    variants: dict[str, Path], name: str
) -> None:
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
def test_quantize_writes_the_weights_beside_the_graph_and_nothing_else(
    variants: dict[str, Path], name: str
) -> None:
    files = {path.name for path in variants[name].iterdir()}
    assert files == {"model.onnx", "model.onnx.data", "config.json"}
    smallest = {"float16": 0.5, "bfloat16": 0.5}.get(name, 0.2)
    sizes = [(variants[n] / "model.onnx.data").stat().st_size for n in ("fp32", name)]
    assert smallest * sizes[0] < sizes[1] < 0.75 * sizes[0]


def test_quantize_leaves_its_source_as_it_was(
    source_hashes: dict[str, str], variants: dict[str, Path]
) -> None:
    assert {path.name: hash_file(path) for path in variants["fp32"].iterdir()} == source_hashes


@pytest.mark.parametrize("name", ["hqq", "dynamic", "percentile"])
def test_quantize_says_nothing(
    exported_llama: Any,
    tmp_path: Path,
    name: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """onnxruntime logs and prints several lines per node, between the stages of an export."""
    with caplog.at_level(logging.INFO):
        quantize_variant(exported_llama.variants["fp32"], tmp_path, VARIANTS[name], TEXTS)
        logging.getLogger("after").warning("heard again")
    assert caplog.messages == ["heard again"]
    assert "".join(capfd.readouterr()) == ""


# --- the grid


def test_read_grid_weights_gives_the_codes_and_scales_of_plain_rounding(
    exported_llama: Any, variants: dict[str, Path]
) -> None:
    source = load_untied(exported_llama.variants["fp32"])
    read = read_grid_weights(load_graph(variants["rtn4"]))
    assert read.keys() == set(float_matmuls(source))
    for name, weight in read.items():
        expected = round_to_nearest(float_weight(source, name), BlockGrid(4, 32))
        assert torch.equal(weight.codes, expected.codes)
        assert torch.equal(weight.scales, expected.scales)


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
def test_quantize_costs_a_kl_within_bounds(
    variants: dict[str, Path], name: str, least: float, most: float
) -> None:
    assert least < kl(variants["fp32"], variants[name], HELD_OUT) < most


def test_gptq_costs_less_than_plain_rounding(variants: dict[str, Path]) -> None:
    gptq_kl, rtn_kl = (kl(variants["fp32"], variants[n], HELD_OUT) for n in ("gptq4", "rtn4"))
    assert gptq_kl < 0.95 * rtn_kl


@pytest.mark.parametrize("name", RUNNABLE)
def test_quantized_logits_of_picked_rows_are_those_of_all_rows(
    variants: dict[str, Path], name: str
) -> None:
    """The If in front of the head survives, both branches of it."""
    model = load_graph(variants[name])
    session = open_session(model)
    (feed,) = text_feeds(model, HELD_OUT[:1])
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


def test_planted_outlier_channel_fails_the_int8_gate(tiny_teacher: Path, tmp_path: Path) -> None:
    """The same model without it passes: `rtn8` of the table above."""
    planted, ids = random_model(), torch.arange(10)[None]
    plant_outlier(planted)
    with torch.inference_mode():
        difference = (random_model()(ids).logits - planted(ids).logits).abs().max()
    assert difference < 1e-3, "the same in float"
    source = export_model(planted, tiny_teacher, tmp_path).variants["fp32"]
    config = WeightOnlyVariant(bits=8, block_size=32, accuracy_level=4)
    quantize_variant(source, tmp_path / "int8", config, [])
    shutil.copy(source / "config.json", tmp_path / "int8")
    assert kl(source, tmp_path / "int8", HELD_OUT) > GatesConfig().quantized_kl == 0.02


def test_quantize_to_float16_runs_in_any_architecture(exported: Any, tmp_path: Path) -> None:
    quantize_variant(exported.variants["fp32"], tmp_path, VARIANTS["float16"], [])
    shutil.copy(exported.variants["fp32"] / "config.json", tmp_path)
    assert kl(exported.variants["fp32"], tmp_path, HELD_OUT) < 1e-3


# --- calibration


@pytest.mark.parametrize(
    "config",
    [
        StaticVariant(method="static", num_calibration_texts=1),
        WeightOnlyVariant(method="gptq", bits=4, block_size=32, num_calibration_texts=1),
    ],
)
def test_quantize_calibrates_with_only_so_many_texts(
    exported_llama: Any, tmp_path: Path, config: Any
) -> None:
    def quantized(used: list[Example], num_texts: int) -> str:
        limited = config.model_copy(update={"num_calibration_texts": num_texts})
        quantize_variant(exported_llama.variants["fp32"], tmp_path, limited, used)
        return hash_file(tmp_path / "model.onnx") + hash_file(tmp_path / "model.onnx.data")

    assert quantized(TEXTS, 1) == quantized(TEXTS[:1], 9) != quantized(TEXTS, 9)


@pytest.mark.parametrize(
    ("config", "texts", "message"),
    [
        (VARIANTS["static"], [], "^static: there is no calibration text"),
        (VARIANTS["gptq4"], [], "^gptq: there is no calibration text"),
        (
            WeightOnlyVariant(method="gptq", bits=4, block_size=32, symmetric=False),
            TEXTS,
            r"^gptq: symmetric is false",
        ),
    ],
)
def test_quantize_that_cannot_be_is_refused(
    exported_llama: Any, tmp_path: Path, config: Any, texts: list[Example], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        quantize_variant(exported_llama.variants["fp32"], tmp_path, config, texts)
