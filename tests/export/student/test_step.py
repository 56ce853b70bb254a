from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.run.errors import ExportError
from export.run.settings import CacheConfig
from export.run.training import PhaseConfig
from export.student.logits_cache import write_logits_cache
from export.student.losses import DistillationLoss, forward_kl
from export.student.matching import LayerMap, Matching
from export.student.prune import drop_layers
from export.student.step import (
    HEAD_SLICE,
    CachedPair,
    Forward,
    Pair,
    StepObjective,
    accumulate,
    measure_kl,
    plan_steps,
    schedule,
)
from export.teacher.examples import Example, collate
from serve.text.real_tokens import RealTokens
from tests.support.random_models import random_examples, random_model

UNEVEN = [(3, 1), (5, 9), (2, 4), (7, 2)]
BATCH = random_examples([*UNEVEN, (90, 14)])
LOSS = DistillationLoss(alpha=0.5, temperature=2.0)
OBJECTIVE = StepObjective(LOSS)
# Its roundings depend on how a step is cut into batches; bfloat16's would hide everything else.
EXACT = torch.float32


def make_pair(num_shared_layers: int = 0, architecture: str = "llama") -> Pair:
    teacher = random_model(architecture, num_layers=3)
    return Pair(drop_layers(teacher, [0, 2]), teacher, num_shared_layers)


@pytest.fixture
def pair() -> Pair:
    return make_pair()


def gradients(
    forward: Forward,
    micro_batches: list[list[Example]],
    objective: StepObjective = OBJECTIVE,
    dtype: torch.dtype = EXACT,
) -> dict[str, torch.Tensor]:
    """Return one step's mean loss under "loss", and the gradient of every parameter."""
    student = forward.student
    student.zero_grad(set_to_none=True)
    sums = accumulate(forward, micro_batches, objective, dtype=dtype)
    found = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    return {"loss": torch.tensor(sums.total / sums.num_tokens), **found}


def completion_logits(model: Any, example: Example) -> torch.Tensor:
    """Return the plain model's logits `(N, V)` that predict the completion."""
    input_ids = torch.tensor([example.prompt_token_ids + example.completion_token_ids])
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids).logits[0]
    return logits[len(example.prompt_token_ids) - 1 : -1]


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6, msg=name)


# --- what must not change loss and gradient


CUTS = {
    "examples alone": [[example] for example in BATCH],
    "twice in one": [BATCH + BATCH],
    "twice in two": [BATCH, BATCH],
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_gradient_is_the_same_however_the_step_is_cut(pair: Pair, cut: list[list[Example]]) -> None:
    """The longest example brings the shortest 100 pad tokens."""
    assert_equal(gradients(pair, cut), gradients(pair, [BATCH]))


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_gradient_of_matching_is_the_same_however_the_step_is_cut(
    matched: tuple[Pair, Matching], cut: list[list[Example]]
) -> None:
    pair, objective = matched[0], StepObjective(LOSS, 0.1, 0.1)
    actual, expected = (gradients(pair, step, objective) for step in (cut, [BATCH]))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():  # terms of many sizes: rounded relative to the largest
        assert (actual[name] - value).norm() < 1e-5 * value.norm(), name


def test_gradient_is_that_of_one_plain_backward_of_loss_and_matching(
    matched: tuple[Pair, Matching],
) -> None:
    pair, matching = matched
    batch, objective = random_examples([*UNEVEN, (9, HEAD_SLICE)]), StepObjective(LOSS, 0.25, 3.0)
    actual = gradients(pair, [batch], objective)
    projections = [p.grad.clone() for p in matching.parameters() if p.grad is not None]
    assert len(projections) == 2 and all(p.abs().sum() > 0 for p in projections)
    found = accumulate(pair, [batch], objective, dtype=EXACT)
    pair.student.zero_grad()
    matching.zero_grad()
    input_ids, positions, labels = collate(batch)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    student, teacher = (m(input_ids, **wanted) for m in (pair.student, pair.teacher))
    logits, target = (o.logits.flatten(0, 1)[positions] for o in (student, teacher))
    loss, sums = LOSS(logits, target.detach(), labels), matching(student, teacher, positions)
    total = loss.total + 0.25 * sums.hidden_sum + 3.0 * sums.attention_sum
    (total / len(labels)).backward()
    expected = {n: p.grad for n, p in pair.student.named_parameters() if p.grad is not None}
    assert_equal(actual, {"loss": total.detach() / len(labels), **expected})
    for gradient, projection in zip(projections, matching.parameters(), strict=True):
        torch.testing.assert_close(gradient, projection.grad, rtol=1e-5, atol=1e-6)
    parts = (loss.soft, loss.hard, sums.hidden_sum, sums.attention_sum)
    assert (found.soft, found.hard, found.hidden, found.attention) == pytest.approx(
        tuple(part.item() for part in parts), rel=1e-5
    )
    assert found.num_tokens == len(labels) > HEAD_SLICE, "the head runs in several slices"


def test_loss_without_matching_is_that_of_the_plain_models(pair: Pair) -> None:
    (example,) = random_examples([(4, 5)])
    student, teacher = (completion_logits(m, example) for m in (pair.student, pair.teacher))
    expected = LOSS(student, teacher, torch.tensor(example.completion_token_ids))
    sums = accumulate(pair, [[example]], OBJECTIVE, dtype=EXACT)
    assert (sums.num_tokens, sums.hidden, sums.attention) == (5, 0, 0)
    assert sums.total == pytest.approx(float(expected.total), rel=1e-5)


def test_gradient_under_bfloat16_autocast_stays_close_to_float32(pair: Pair) -> None:
    batch = random_examples(UNEVEN)
    rounded, exact = gradients(pair, [batch], dtype=torch.bfloat16), gradients(pair, [batch])
    assert all(value.dtype == torch.float32 for value in rounded.values())
    assert float(rounded["loss"]) != float(exact["loss"]), "autocast did nothing"
    for name, value in exact.items():
        cosine = torch.cosine_similarity(rounded[name].flatten(), value.flatten(), dim=0)
        assert cosine > 0.99, name


# --- shared layers


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_shared_layers_leave_loss_and_other_gradients_as_they_are(architecture: str) -> None:
    apart, shared = (gradients(make_pair(n, architecture), [BATCH]) for n in (0, 1))
    names = {name for name in apart if "layers.1." in name} | {"loss", "model.norm.weight"}
    assert shared.keys() == names
    assert_equal(shared, {name: apart[name] for name in names})


# --- matching what is inside


@pytest.fixture
def matched() -> tuple[Pair, Matching]:
    """A student of half the teacher's depth, and what compares their layers; eager attention."""
    teacher = random_model(num_layers=3)
    student = drop_layers(teacher, [0, 2])
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    torch.nn.init.normal_(student.model.layers[0].mlp.up_proj.weight, std=0.3)
    matching = Matching(LayerMap.of_pruned([0, 2], 3), 32, 32)
    return Pair(student, teacher, matching=matching), matching


def test_matching_sees_no_attention_unless_it_is_eager(matched: tuple[Pair, Matching]) -> None:
    pair, _ = matched
    for model in (pair.student, pair.teacher):
        model.set_attn_implementation("sdpa")
    sums = accumulate(pair, [random_examples(UNEVEN)], StepObjective(LOSS, 1.0, 1.0), dtype=EXACT)
    assert sums.attention == 0 and sums.hidden > 0


def test_objective_is_that_of_the_phase() -> None:
    phase = PhaseConfig(
        alpha=0.7, temperature=3.0, divergence="jsd", jsd_beta=0.2, hidden_weight=0.1,
        attention_weight=0.4,
    )  # fmt: skip
    assert StepObjective.of(phase, RealTokens(90)) == StepObjective(
        DistillationLoss(0.7, 3.0, "jsd", 0.2, RealTokens(90)), 0.1, 0.4
    )


# --- logits from a cache, padded vocabularies


def test_gradient_of_cached_logits_is_that_of_the_live_teacher(pair: Pair, tmp_path: Path) -> None:
    # float16 logits down to -16 are off by at most 2^-7, so each probability by that share.
    batch = random_examples(UNEVEN)
    cache = write_logits_cache(
        tmp_path, pair.teacher, batch, CacheConfig(kind="dense"), teacher_sha256="0" * 64
    )
    live = gradients(pair, [batch[:3], batch[3:]])
    cached = gradients(CachedPair(pair.student, cache), [batch[:3], batch[3:]])
    assert cached.keys() == live.keys()
    for name, value in live.items():
        error = (cached[name] - value).norm() / value.norm()
        assert 0 < error < 2**-7, name


def test_gradient_has_no_part_of_columns_beyond_the_real_tokens(pair: Pair) -> None:
    batches = [random_examples(UNEVEN)]
    below_90 = [[Example(e.prompt_token_ids, tuple(t % 90 for t in e.completion_token_ids))
                 for e in batches[0]]]  # fmt: skip
    objective = StepObjective(DistillationLoss(real_tokens=RealTokens(90)))
    before = gradients(pair, below_90, objective)
    kl = measure_kl(pair, below_90[0], real_tokens=RealTokens(90), dtype=EXACT)
    with torch.no_grad():
        pair.teacher.lm_head.weight = torch.nn.Parameter(pair.teacher.lm_head.weight.clone())
        pair.teacher.lm_head.weight[90:] += 1
    assert_equal(gradients(pair, below_90, objective), before)
    assert measure_kl(pair, below_90[0], real_tokens=RealTokens(90), dtype=EXACT) == kl
    assert measure_kl(pair, below_90[0], dtype=EXACT) != kl


def test_teacher_with_a_larger_padded_vocabulary_needs_real_tokens() -> None:
    teacher, student = (random_model(num_layers=1) for _ in range(2))
    teacher.resize_token_embeddings(128)
    pair, batch = Pair(student, teacher), random_examples(UNEVEN)
    with pytest.raises(ExportError, match=r"97 columns, the teacher's 128.*real_tokens"):
        gradients(pair, [batch])
    padded = StepObjective(DistillationLoss(alpha=1.0, real_tokens=RealTokens(97)))
    assert float(gradients(pair, [batch], padded)["loss"]) == pytest.approx(0, abs=1e-6)
    kl = measure_kl(pair, batch, real_tokens=RealTokens(97), dtype=EXACT)
    assert kl == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("num_shared_layers", [0, 1])
def test_measured_kl_is_the_exact_one_of_the_plain_models(num_shared_layers: int) -> None:
    """Of more tokens than one micro-batch or one slice of the head takes."""
    pair = make_pair(num_shared_layers)
    examples = random_examples([*UNEVEN, *[(4, HEAD_SLICE // 2)] * 20])
    kls = [
        forward_kl(*(completion_logits(m, e) for m in (pair.student, pair.teacher)))
        for e in examples
    ]
    expected = float(torch.cat(kls).mean())
    assert expected > 0.1
    assert measure_kl(pair, examples, dtype=EXACT) == pytest.approx(expected, rel=1e-5)


# --- steps and learning rate

many_lengths = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=40)


def numbered(lengths: list[tuple[int, int]]) -> list[Example]:
    """Examples that differ, whatever their lengths."""
    return [Example((i,) * p, (i,) * c) for i, (p, c) in enumerate(lengths)]


@settings(deadline=None, max_examples=25)
@given(many_lengths, st.integers(0, 3))
def test_plan_has_every_example_in_one_full_step_and_no_micro_batch_too_large(
    lengths: list[tuple[int, int]], epoch: int
) -> None:
    phase = PhaseConfig(tokens_per_step=50, tokens_per_micro_batch=64)
    examples = numbered(lengths)
    steps = plan_steps(examples, phase, epoch)
    batches = list(itertools.chain(*steps))
    assert sorted(itertools.chain(*batches), key=examples.index) == examples
    tokens = [sum(len(e.completion_token_ids) for b in step for e in b) for step in steps]
    assert all(count >= 50 for count in tokens[:-1])
    assert all(len(batch) == 1 or len(batch) * max(map(len, batch)) <= 64 for batch in batches)


def test_plan_follows_from_seed_and_epoch_alone() -> None:
    examples = numbered([(2, 3)] * 30)

    def order(seed: int, epoch: int) -> list[list[list[Example]]]:
        return plan_steps(examples, PhaseConfig(seed=seed, tokens_per_step=9), epoch)

    assert order(0, 0) == order(0, 0)
    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_learning_rate_rises_linearly_and_falls_to_a_tenth() -> None:
    factors = [schedule(step / 1000, 0.05) for step in range(1001)]
    assert factors[:51] == pytest.approx([step / 50 for step in range(51)])
    assert factors[50:] == sorted(factors[50:], reverse=True)
    assert factors[50 + 475] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(("num_steps", "warmup_share"), [(1, 0.0), (1, 0.05), (2, 0.9), (3, 0.0)])
def test_learning_rate_of_the_shortest_trainings_is_not_0(
    num_steps: int, warmup_share: float
) -> None:
    factors = [schedule((step + 0.5) / num_steps, warmup_share) for step in range(num_steps)]
    assert all(0.1 <= factor <= 1 for factor in factors)
    assert max(factors) > 0.5
