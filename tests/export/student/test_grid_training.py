from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from export.run.training import PhaseConfig
from export.student.grid import BlockGrid, GridWeight
from export.student.grid_training import (
    GridParameters,
    load_grid_weights,
    save_grid_weights,
    untie_head,
)
from export.student.step import Pair
from export.student.trainer import Trainer, TrainingPhase
from tests.support.export.grids import round_to_nearest
from tests.support.random_models import random_examples, random_model

GRID = BlockGrid(4, 16)


class OneLayer(torch.nn.Module):
    """A linear layer `(N, K)` by the name "linear", and a norm."""

    def __init__(self, num_outputs: int = 3, num_inputs: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(num_inputs, num_outputs, bias=True)
        self.norm = torch.nn.RMSNorm(num_outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.norm(self.linear(x))
        return output


def on_grid(
    latent: torch.Tensor, log_scale: torch.Tensor, first: torch.Tensor, grid: BlockGrid
) -> torch.Tensor:
    """The slow way: clamp(round(latent / s)) * s, the rounding straight through, by autograd."""
    scales = (first * log_scale.exp())[:, :, None]
    exact = latent.view(*first.shape, grid.block_size) / scales
    rounded = exact + (exact.round() - exact).detach()
    return (rounded.clamp(grid.min_code, grid.max_code) * scales).view_as(latent)


def moved_off_its_grid(parameters: GridParameters, seed: int = 0) -> dict[str, torch.Tensor]:
    """Move latent weights and scales as training would, some weights beyond the last code."""
    torch.manual_seed(seed)
    named = dict(parameters.named())
    with torch.no_grad():
        named["linear.latent"] += 0.1 * torch.randn_like(named["linear.latent"])
        named["linear.log_scale"] += 0.2 * torch.randn_like(named["linear.log_scale"])
    parameters.publish()
    return named


@pytest.mark.parametrize(
    ("grid", "num_outputs"), [(GRID, 3), (BlockGrid(8, 32), 3), (GRID, 9000)], ids=str
)
def test_grid_gradients_are_those_of_a_rounding_passed_straight_through(
    grid: BlockGrid, num_outputs: int
) -> None:
    """9000 outputs of 32 inputs are rounded piece by piece, 2¹⁷ weights each."""
    model = OneLayer(num_outputs)
    first = round_to_nearest(model.linear.weight.detach(), grid).scales
    parameters = GridParameters(model, {"linear": grid})
    named = moved_off_its_grid(parameters)
    latent, log_scale = (
        named[f"linear.{name}"].detach().clone().requires_grad_()
        for name in ("latent", "log_scale")
    )
    slow = on_grid(latent, log_scale, first, grid)
    torch.testing.assert_close(model.linear.weight.detach(), slow.detach())
    x, aim = torch.randn(5, 32), torch.randn(5, num_outputs)
    (model(x) * aim).sum().backward()
    parameters.gather_gradients()
    hidden = torch.nn.functional.linear(x, slow, model.linear.bias)
    (model.norm(hidden) * aim).sum().backward()
    assert (latent.grad == 0).any(), "weights beyond the grid belong to the test"
    torch.testing.assert_close(named["linear.latent"].grad, latent.grad)
    torch.testing.assert_close(named["linear.log_scale"].grad, log_scale.grad)
    assert model.linear.weight.grad is None


def test_grid_weight_is_code_times_scale_before_and_after_it_moves() -> None:
    model = OneLayer()
    expected = round_to_nearest(model.linear.weight.detach(), GRID)
    parameters = GridParameters(model, {"linear": GRID})
    (found,) = parameters.grid_weights().values()
    assert found.codes.equal(expected.codes) and found.scales.equal(expected.scales)
    moved_off_its_grid(parameters)
    (moved,) = parameters.grid_weights().values()
    assert not moved.codes.equal(expected.codes) and not moved.scales.equal(expected.scales)
    assert model.linear.weight.equal(moved.dequantize())


def test_grid_parameters_keep_initial_codes_and_scales_bit_for_bit() -> None:
    model = OneLayer()
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-8, 8, (3, 32), generator=generator, dtype=torch.int8)
    scales = torch.rand(3, 2, generator=generator) - 0.5
    parameters = GridParameters(
        model, {"linear": GRID}, {"linear": GridWeight(GRID, codes, scales)}
    )
    (found,) = parameters.grid_weights().values()
    assert found.codes.equal(codes) and found.scales.equal(scales)
    assert model.linear.weight.equal(found.dequantize())


def test_grid_block_of_zeros_stays_zero_and_has_no_scale_to_learn() -> None:
    model = OneLayer()
    with torch.no_grad():
        model.linear.weight[0, :16] = 0
    parameters = GridParameters(model, {"linear": GRID})
    named = moved_off_its_grid(parameters)
    model(torch.ones(1, 32)).square().sum().backward()
    parameters.gather_gradients()
    assert named["linear.log_scale"].grad[0, 0] == 0
    assert torch.isfinite(named["linear.latent"].grad).all()
    assert model.linear.weight[0, :16].eq(0).all()
    (found,) = parameters.grid_weights().values()
    assert found.codes[0, :16].eq(0).all() and found.scales[0, 0] == 0


def test_grid_gradients_without_a_micro_batch_are_none() -> None:
    parameters = GridParameters(OneLayer(), {"linear": GRID})
    parameters.gather_gradients()
    assert all(tensor.grad is None for tensor in parameters.named().values())


def test_grid_parameters_are_norms_and_grids_and_all_else_is_frozen() -> None:
    model = OneLayer()
    parameters = GridParameters(model, {"linear": GRID})
    assert parameters.named().keys() == {"linear.latent", "linear.log_scale", "norm.weight"}
    assert not model.linear.bias.requires_grad
    weights, scales = parameters.groups(0.5)
    assert len(weights["params"]) == 2 and weights["base_lr"] == 0.5
    assert len(scales["params"]) == 1 and scales["weight_decay"] == 0


def test_grid_trained_student_computes_with_the_weights_that_are_exported(tmp_path: Path) -> None:
    teacher, student = random_model(num_layers=1), random_model(num_layers=1)
    untie_head(student)
    grids = {
        name: GRID
        for name, module in student.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    embeddings = student.model.embed_tokens.weight.detach().clone()
    parameters = GridParameters(student, grids)
    first = parameters.grid_weights()
    phase = PhaseConfig(learning_rate=1e-2, alpha=1.0, tokens_per_step=8)
    examples = random_examples([(3, 8)] * 12)
    training = TrainingPhase(phase, Pair(student, teacher), parameters, 1, lambda _: examples)
    log = Trainer(tmp_path / "checkpoints", dtype=torch.float32).run([lambda: training])
    assert len(log.steps) == 12
    weights = parameters.grid_weights()
    assert weights.keys() == grids.keys()
    for name, weight in weights.items():
        assert not weight.scales.equal(first[name].scales), name
        assert student.get_submodule(name).weight.equal(weight.dequantize()), name
    assert student.model.embed_tokens.weight.equal(embeddings)

    save_grid_weights(tmp_path / "grid.safetensors", weights)
    loaded = load_grid_weights(tmp_path / "grid.safetensors")
    assert loaded.keys() == weights.keys()
    for name, weight in weights.items():
        assert loaded[name].grid == GRID
        assert loaded[name].codes.equal(weight.codes) and loaded[name].scales.equal(weight.scales)


def test_untied_head_is_saved_beside_the_embeddings(tmp_path: Path) -> None:
    model = random_model("llama", num_layers=1)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untie_head(model)
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    assert loaded.lm_head.weight.equal(model.lm_head.weight)
    assert loaded.model.embed_tokens.weight.equal(model.model.embed_tokens.weight)


def test_grid_layer_with_a_partial_last_block_is_trained_like_any_other() -> None:
    model = OneLayer(num_inputs=40)
    parameters = GridParameters(model, {"linear": GRID})
    model.linear(torch.ones(3, 40)).square().sum().backward()
    parameters.gather_gradients()
    torch.optim.SGD(parameters.groups(1e-2), lr=1e-2).step()
    parameters.publish()
    (weight,) = parameters.grid_weights().values()
    assert (weight.codes.shape, weight.scales.shape) == ((3, 40), (3, 3))
    assert model.linear.weight.equal(weight.dequantize())
    assert parameters.named()["linear.latent"][:, 40:].eq(0).all()
