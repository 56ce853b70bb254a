from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from export.student.matching import (
    LayerMap,
    Matching,
    MatchingSums,
    attention_kl,
    relative_squared_error,
)
from export.student.prune import drop_layers
from export.teacher.examples import Example, collate
from tests.support.random_models import random_examples, random_model

WIDTH, NUM_LAYERS = 32, 4
BATCH = random_examples([(3, 5), (6, 2)])


@dataclass(frozen=True)
class Outputs:
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@pytest.fixture
def teacher() -> Any:
    return eager(random_model("llama", num_layers=NUM_LAYERS))


def eager(model: Any) -> Any:
    model.set_attn_implementation("eager")
    return model


def run(model: Any, input_ids: torch.Tensor) -> Any:
    return model.model(
        input_ids=input_ids, use_cache=False, output_hidden_states=True, output_attentions=True
    )


def match(student: Any, teacher: Any, batch: list[Example], matching: Matching) -> MatchingSums:
    input_ids, positions, _ = collate(batch)
    with torch.no_grad():
        target = run(teacher, input_ids)
    return matching(run(student, input_ids), target, positions)


def matching_of(num_student_layers: int = NUM_LAYERS) -> Matching:
    return Matching(LayerMap.by_depth(num_student_layers, NUM_LAYERS), WIDTH, WIDTH)


# --- which layers


@pytest.mark.parametrize(
    ("num_student", "num_teacher", "expected"),
    [(4, 4, (0, 1, 2, 3)), (2, 4, (1, 3)), (3, 4, (1, 2, 3)), (1, 7, (6,)), (4, 2, (0, 0, 1, 1))],
)
def test_layers_are_mapped_by_depth_and_the_last_to_the_last(
    num_student: int, num_teacher: int, expected: tuple[int, ...]
) -> None:
    assert LayerMap.by_depth(num_student, num_teacher) == LayerMap(expected, expected)


def test_layer_map_of_a_pruned_student_is_exact_behind_idle_layers(
    teacher: Any,
) -> None:
    """With the layers after 0 and 2 silenced, the pruned student is the teacher at its map."""
    for layer in (1, 3):
        teacher.model.layers[layer].self_attn.o_proj.weight.data.zero_()
        teacher.model.layers[layer].mlp.down_proj.weight.data.zero_()
    layer_map = LayerMap.of_pruned([0, 2], NUM_LAYERS)
    assert layer_map == LayerMap(hidden=(1, 3), attention=(0, 2))
    batch = [Example((5, 6, 7), (8, 9))]
    sums = match(drop_layers(teacher, [0, 2]), teacher, batch, Matching(layer_map, WIDTH, WIDTH))
    assert sums.hidden_sum.item() == pytest.approx(0.0, abs=1e-9)
    assert sums.attention_sum.item() == pytest.approx(0.0, abs=1e-6)


# --- values


def test_relative_squared_error_is_free_of_the_scale_and_1_for_zeros() -> None:
    teacher = torch.tensor([[3.0, 4.0], [0.1, 0.0]])
    student = torch.tensor([[3.0, 3.0], [0.2, 0.0]])
    errors = relative_squared_error(student, teacher)
    torch.testing.assert_close(errors, torch.tensor([1 / 25, 1.0]))
    torch.testing.assert_close(relative_squared_error(1000 * student, 1000 * teacher), errors)
    assert relative_squared_error(torch.zeros(2, 2), teacher).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        # Two heads that together attend [.7, .2, .1], one of the student that attends [.2, .3, .5].
        ([[1.0, 0.0, 0.0], [0.4, 0.4, 0.2]], [[0.2, 0.3, 0.5]]),
        # bfloat16 probabilities do not add up to 1.
        ([[0.707, 0.202, 0.101]], [[0.198, 0.297, 0.495]]),
    ],
)
def test_attention_kl_is_of_the_normalised_mean_of_the_heads(
    teacher: list[list[float]], student: list[list[float]]
) -> None:
    maps = (torch.tensor(heads).view(1, len(heads), 1, 3) for heads in (student, teacher))
    assert attention_kl(*maps, torch.tensor([0])).tolist() == pytest.approx([0.6348972651])


def test_attention_of_exactly_0_costs_much_but_not_everything() -> None:
    teacher = torch.tensor([0.5, 0.5, 0.0]).view(1, 1, 1, 3)
    student = torch.tensor([1.0, 0.0, 0.0]).view(1, 1, 1, 3).requires_grad_()
    kl = attention_kl(student, teacher, torch.tensor([0])).sum()
    kl.backward()
    tiny = torch.finfo(torch.float32).tiny
    assert float(kl.detach()) == pytest.approx(0.5 * (math.log(0.5) + math.log(0.5 / tiny)))
    assert student.grad is not None and student.grad.isfinite().all()


def test_matching_sums_are_means_over_layers_of_sums_over_positions(teacher: Any) -> None:
    student = eager(random_model("llama", num_layers=2, seed=1))
    input_ids, positions, _ = collate(BATCH)
    with torch.no_grad():
        ours, theirs = run(student, input_ids), run(teacher, input_ids)
        sums = matching_of(2)(ours, theirs, positions)
    hidden, attention = 0.0, 0.0
    for layer, target in ((0, 1), (1, 3)):
        for position in positions.tolist():
            row, column = divmod(position, input_ids.shape[1])
            s = ours.hidden_states[layer + 1][row, column]
            t = theirs.hidden_states[target + 1][row, column]
            hidden += float((s - t).square().mean() / t.square().mean()) / 2
            q = ours.attentions[layer][row, :, column, : column + 1].mean(0)
            p = theirs.attentions[target][row, :, column, : column + 1].mean(0)
            attention += float((p * (p / q).log()).sum()) / 2
    assert sums.hidden_sum.item() == pytest.approx(hidden, rel=1e-5)
    assert sums.attention_sum.item() == pytest.approx(attention, rel=1e-5)
    assert attention > 0.01 and sums.num_tokens == 7


def test_matching_sums_are_those_of_each_example_alone(teacher: Any) -> None:
    student, matching = eager(random_model("llama", num_layers=2, seed=1)), matching_of(2)
    together = match(student, teacher, [*BATCH, Example((1,) * 90, (2,))], matching)
    alone = [match(student, teacher, [e], matching) for e in [*BATCH, Example((1,) * 90, (2,))]]
    for name in ("hidden_sum", "attention_sum"):
        expected = sum(getattr(sums, name).item() for sums in alone)
        assert getattr(together, name).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("field", ["hidden_states", "attentions"])
def test_term_that_was_not_asked_for_is_0(teacher: Any, field: str) -> None:
    input_ids, positions, _ = collate(BATCH)
    outputs = Outputs(**{field: getattr(run(teacher, input_ids), field)})
    noisy = Outputs(**{field: tuple(t * torch.rand_like(t) for t in getattr(outputs, field))})
    sums = matching_of()(noisy, outputs, positions)
    hidden, attention = sums.hidden_sum.item(), sums.attention_sum.item()
    assert (hidden > 0, attention > 0) == (field == "hidden_states", field == "attentions")
    assert min(hidden, attention) == 0.0


# --- gradients


def test_matching_gradient_enters_student_and_projections_at_completion_positions_only() -> None:
    _, positions, _ = collate(BATCH)
    num_rows, width = len(BATCH), 7
    student, teacher = (
        [torch.rand(num_rows, width, WIDTH, requires_grad=True) for _ in range(3)] for _ in "st"
    )
    maps = [torch.rand(num_rows, 2, width, width, requires_grad=True) for _ in "st"]
    matching = Matching(LayerMap.by_depth(2, 2), WIDTH, WIDTH)
    sums = matching(
        Outputs(tuple(student), (maps[0],) * 2), Outputs(tuple(teacher), (maps[1],) * 2), positions
    )
    (sums.hidden_sum + sums.attention_sum).backward()
    is_completion = torch.zeros(num_rows * width, dtype=torch.bool)
    is_completion[positions] = True
    assert student[0].grad is None  # the embeddings are not matched
    for hidden in student[1:]:
        assert hidden.grad is not None
        assert hidden.grad.flatten(0, 1).ne(0).any(-1).equal(is_completion)
    assert maps[0].grad is not None
    by_query = maps[0].grad.transpose(1, 2).flatten(0, 1)
    assert by_query.ne(0).any(-1).any(-1).equal(is_completion)
    assert all(t.grad is None for t in (*teacher, maps[1]))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in matching.parameters())


# --- projections


def test_projections_are_float32_identities_and_draw_nothing_at_random() -> None:
    state = torch.random.get_rng_state()
    matching = Matching(LayerMap.by_depth(2, 4), 3, 3)
    assert torch.random.get_rng_state().equal(state)
    assert [p.weight.tolist() for p in matching.projections] == [torch.eye(3).tolist()] * 2
    assert {p.dtype for p in matching.parameters()} == {torch.float32}


def test_narrower_student_is_projected_to_the_teachers_width() -> None:
    matching = Matching(LayerMap.by_depth(1, 1), 2, 3)
    student, teacher = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 2.0, 5.0]]])
    sums = matching(Outputs((student,) * 2), Outputs((teacher,) * 2), torch.tensor([0]))
    assert sums.hidden_sum.item() == pytest.approx(25 / 30)


def test_autocast_leaves_matching_in_float32(teacher: Any) -> None:
    input_ids, positions, _ = collate(BATCH)
    with torch.no_grad():
        outputs = run(teacher, input_ids)
        noisy = Outputs(tuple(h + 0.1 * torch.rand_like(h) for h in outputs.hidden_states))
        expected = matching_of()(noisy, outputs, positions).hidden_sum
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert matching_of()(noisy, outputs, positions).hidden_sum.equal(expected)
