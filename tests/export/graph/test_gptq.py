from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

from export.graph.calibration import collect_hessians, hessian_groups
from export.graph.gptq import (
    DAMPENING,
    SHRINKS,
    gptq,
    signal_weighted_scales,
)
from export.graph.quantize import gptq_weights
from export.run.variants import WeightOnlyVariant
from export.student.grid import BlockGrid, GridWeight, absmax_scales, encode
from tests.support.export.grids import round_to_nearest
from tests.support.random_models import random_examples


def correlated_layer(num_outputs: int = 24, num_inputs: int = 96) -> tuple[torch.Tensor, ...]:
    """A weight `(N, K)`, and inputs `(rows, K)` of which a quarter is independent."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = normal(500, num_inputs // 4) @ normal(num_inputs // 4, num_inputs)
    return normal(num_outputs, num_inputs), inputs + 0.3 * normal(500, num_inputs)


def output_error(quantized: GridWeight, weight: torch.Tensor, inputs: torch.Tensor) -> float:
    return ((quantized.dequantize() - weight) @ inputs.T).square().mean().item()


def slow_gptq(weight: torch.Tensor, hessian: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """Optimal brain quantization, the input with the most signal next: equations 2 and 3.

    The inverse of what remains of the damped Hessian is computed anew for every input.
    """
    weight, hessian = weight.double().clone(), hessian.double().clone()
    hessian += DAMPENING * hessian.diagonal().mean() * torch.eye(len(hessian))
    scales = signal_weighted_scales(weight.float(), hessian.diagonal().float(), grid).double()
    left = hessian.diagonal().argsort(descending=True).tolist()
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        scale = scales[:, left[0] // grid.block_size]
        code = (weight[:, left[0]] / scale).round().clamp(grid.min_code, grid.max_code)
        error = weight[:, left[0]] - code * scale
        weight[:, left] -= error[:, None] * inverse[0] / inverse[0, 0]
        weight[:, left.pop(0)] = code * scale
    return weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [16, 32])
def test_gptq_error_is_a_fraction_of_plain_rounding(bits: int, block_size: int) -> None:
    weight, inputs = correlated_layer()
    grid = BlockGrid(bits, block_size)
    error = output_error(gptq(weight, 2 * inputs.T @ inputs, grid), weight, inputs)
    assert error < 0.3 * output_error(round_to_nearest(weight, grid), weight, inputs)


# 144 inputs are two lazy batches; 40 end in the middle of a block.
@pytest.mark.parametrize(
    ("num_inputs", "grid"),
    [(144, BlockGrid(4, 16)), (40, BlockGrid(8, 16)), (40, BlockGrid(4, 64))],
    ids=str,
)
def test_gptq_in_lazy_batches_does_what_the_paper_says(num_inputs: int, grid: BlockGrid) -> None:
    weight, inputs = correlated_layer(num_outputs=8, num_inputs=num_inputs)
    hessian = 2 * inputs.T @ inputs
    expected = slow_gptq(weight, hessian, grid).float()
    torch.testing.assert_close(gptq(weight, hessian, grid).dequantize(), expected)


def test_gptq_leaves_weight_and_hessian_as_they_were() -> None:
    weight, inputs = correlated_layer()
    before, hessian = weight.clone(), 2 * inputs.T @ inputs
    hessian_before = hessian.clone()
    gptq(weight, hessian, BlockGrid(4, 32))
    assert torch.equal(weight, before)
    assert torch.equal(hessian, hessian_before)


def test_gptq_rounds_a_dead_channel_by_itself() -> None:
    weight, inputs = correlated_layer()
    grid = BlockGrid(8, 96)
    inputs[:, 7] = 0
    quantized = gptq(weight, 2 * inputs.T @ inputs, grid)
    assert quantized.scales.isfinite().all()
    assert ((quantized.dequantize() - weight)[:, 7].abs() <= quantized.scales[:, 0].abs()).all()
    assert output_error(quantized, weight, inputs) < 0.3 * output_error(
        round_to_nearest(weight, grid), weight, inputs
    )


def test_gptq_without_any_signal_rounds_every_weight_by_itself() -> None:
    weight, _ = correlated_layer()
    grid = BlockGrid(4, 32)
    quantized = gptq(weight, torch.zeros(96, 96), grid)
    scales = signal_weighted_scales(weight, torch.ones(96), grid)
    assert torch.equal(quantized.scales, scales)
    assert torch.equal(quantized.codes, encode(weight, scales, grid))


def test_gptq_does_not_depend_on_the_order_within_blocks() -> None:
    weight, inputs = correlated_layer()
    grid, hessian = BlockGrid(4, 32), 2 * inputs.T @ inputs
    generator = torch.Generator().manual_seed(1)
    order = [32 * block + torch.randperm(32, generator=generator) for block in range(3)]
    shuffled = torch.cat(order)
    expected = gptq(weight, hessian, grid).codes[:, shuffled]
    codes = gptq(weight[:, shuffled], hessian[shuffled][:, shuffled], grid).codes
    assert (codes == expected).float().mean() > 0.99


@pytest.mark.parametrize(("bits", "block_size", "num_inputs"), [(4, 16, 40), (8, 32, 64)])
def test_signal_weighted_scales_have_the_least_error_of_all_shrinks(
    bits: int, block_size: int, num_inputs: int
) -> None:
    weight, inputs = correlated_layer(num_outputs=5, num_inputs=num_inputs)
    grid, signal = BlockGrid(bits, block_size), inputs.square().sum(0) ** 2
    found = signal_weighted_scales(weight, signal, grid)
    for row, block in np.ndindex(*found.shape):
        columns = slice(block * block_size, (block + 1) * block_size)
        values = weight[row, columns]
        scales = torch.tensor(SHRINKS)[:, None] * absmax_scales(values[None], grid)
        codes = (values / scales).round().clamp(grid.min_code, grid.max_code)
        errors = ((codes * scales - values) ** 2 * signal[columns]).sum(1)
        torch.testing.assert_close(found[row, block], scales[errors.argmin(), 0])


def test_gptq_keeps_a_block_of_zeros() -> None:
    weight, inputs = correlated_layer()
    weight[:, :] = 0
    quantized = gptq(weight, 2 * inputs.T @ inputs, BlockGrid(4, 32))
    assert not quantized.dequantize().any()


# --- Hessians of a real graph

TEXTS = random_examples([(8, 20), (5, 30), (20, 11), (2, 25)])
SIZES = {"a": 10, "b": 20, "c": 3}


def test_hessian_is_that_of_the_torch_model(exported_llama: Any) -> None:
    (head,) = [
        node
        for node in onnx.load(exported_llama.variants["fp32"] / "model.onnx").graph.node
        if "logits" in node.output
    ]
    hessians = collect_hessians(exported_llama.variants["fp32"], [head.input[0]], TEXTS)
    model = AutoModelForCausalLM.from_pretrained(exported_llama.student_dir)
    expected = torch.zeros(32, 32)
    for text in TEXTS:
        ids = torch.tensor([text.prompt_token_ids + text.completion_token_ids])
        with torch.inference_mode():
            hidden = model.model(ids).last_hidden_state[0]
        expected += 2 * hidden.T @ hidden
    torch.testing.assert_close(hessians[head.input[0]], expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("sizes", "max_bytes", "groups"),
    [
        (SIZES, 10**9, [["a", "b", "c"]]),
        (SIZES, 4 * (100 + 400), [["a", "b"], ["c"]]),
        (SIZES, 4 * (100 + 400) - 1, [["a"], ["b", "c"]]),
        (SIZES, 1, [["a"], ["b"], ["c"]]),
        ({}, 1, []),
    ],
)
def test_hessian_groups_fit(sizes: dict[str, int], max_bytes: int, groups: list[Any]) -> None:
    assert list(hessian_groups(sizes, max_bytes)) == groups


def test_gptq_weights_in_groups_are_the_same(exported_llama: Any) -> None:
    source: Path = exported_llama.variants["fp32"]
    config = WeightOnlyVariant(method="gptq", bits=4, block_size=32)
    at_once, one_by_one = (gptq_weights(source, config, TEXTS, size) for size in (2**30, 1))
    assert len(at_once) == 26
    assert at_once.keys() == one_by_one.keys()
    for name, weight in at_once.items():
        assert torch.equal(weight.codes, one_by_one[name].codes)
        assert torch.equal(weight.scales, one_by_one[name].scales)
