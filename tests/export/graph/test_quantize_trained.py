"""A student trained on the grid of its variant, and the graph that is made of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from export.graph.quantize import (
    pack_by_node,
    quantize_trained,
    quantize_variant,
    quantized_node_counts,
    split_by_module,
)
from export.run.variants import GridConfig, WeightOnlyVariant
from export.student.grid import BlockGrid, GridWeight
from tests.support.export.grids import read_grid_weights, round_to_nearest
from tests.support.graphs import load_graph, logprobs
from tests.support.random_models import NUM_LAYERS, random_examples, random_model

NUM_PRODUCTS = 5 * NUM_LAYERS + 1
HELD_OUT = random_examples([(8, 20), (5, 30), (20, 11), (2, 25)], seed=1)
FINE4, FINE8 = GridConfig(bits=4, block_size=16), GridConfig(bits=8, block_size=16)
TRAINED = WeightOnlyVariant(
    bits=4, block_size=32, accuracy_level=0, overrides={"lm_head": FINE8, "qkv_proj": FINE4}
)


def assert_same(actual: Mapping[str, GridWeight], expected: Mapping[str, GridWeight]) -> None:
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert actual[name].grid == weight.grid, name
        assert actual[name].codes.equal(weight.codes), name
        assert actual[name].scales.equal(weight.scales), name


def train_on_grid(student: Any) -> dict[str, GridWeight]:
    """Put every linear layer on the grid of `TRAINED`, as training on it does; by module name."""
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


@pytest.mark.parametrize("architecture", ["llama", "qwen2-untied", "qwen3"])
def test_quantize_trained_puts_the_student_in_the_graph_bit_for_bit(
    export_once: Callable[[str], Any], tmp_path: Path, architecture: str
) -> None:
    exported = export_once(architecture)
    student = AutoModelForCausalLM.from_pretrained(exported.student_dir)
    weights = train_on_grid(student)
    folder = tmp_path / "new" / "folder"
    quantize_trained(exported.variants["fp32"], folder, TRAINED, weights)
    model = load_graph(folder)
    assert quantized_node_counts(model) == {"MatMulNBits": NUM_PRODUCTS}
    read = split_by_module(
        read_grid_weights(model), lambda name: student.get_submodule(name).out_features
    )
    assert_same(read, weights)
    shutil.copy(exported.variants["fp32"] / "config.json", folder)
    with torch.inference_mode():
        expected = [
            student(torch.tensor([e.prompt_token_ids + e.completion_token_ids])).logits[0]
            for e in HELD_OUT
        ]
    torch.testing.assert_close(
        logprobs(folder, HELD_OUT), torch.cat(expected).log_softmax(-1), atol=1e-3, rtol=1e-4
    )


def test_quantize_trained_of_an_untrained_layer_is_refused(
    exported_llama: Any, tmp_path: Path
) -> None:
    weights = train_on_grid(random_model())
    del weights["model.layers.2.self_attn.k_proj"]
    with pytest.raises(AssertionError, match=r"model\.layers\.2\.self_attn\.k_proj"):
        quantize_trained(exported_llama.variants["fp32"], tmp_path, TRAINED, weights)


def test_grid_weights_split_by_module_are_packed_again(exported_llama: Any, tmp_path: Path) -> None:
    quantize_variant(exported_llama.variants["fp32"], tmp_path, TRAINED, [])
    student, weights = random_model(), read_grid_weights(load_graph(tmp_path))
    split = split_by_module(weights, lambda name: student.get_submodule(name).out_features)
    assert len(split) == 7 * NUM_LAYERS + 1
    assert {name for name in split if name.startswith("model.layers.1.self_attn")} == {
        f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"
    }
    packed = pack_by_node(split, weights)
    assert list(packed) == list(weights)
    assert_same(packed, weights)
