from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from export import distill
from export.distill import (
    Example,
    Pair,
    StepRecord,
    TrainingPlan,
    accumulate,
    collate,
    plan_steps,
    schedule,
    train,
)
from export.losses import DistillationLoss
from export.prune import drop_layers

MakeModel = Callable[..., Any]
MakeExamples = Callable[..., list[Example]]
UNEVEN = [(3, 1), (5, 9), (2, 4), (7, 2)]
LOSS = DistillationLoss(alpha=0.5, temperature=2.0)


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without autocast's bfloat16, whose roundings depend on how a step is cut into batches."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.fixture
def make_pair(make_model: MakeModel) -> Callable[..., Pair]:
    def make(num_shared_layers: int = 0, architecture: str = "llama") -> Pair:
        teacher = make_model(architecture, num_layers=3)
        return Pair(drop_layers(teacher, [0, 2]), teacher, num_shared_layers)

    return make


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair()


def gradients(pair: Pair, micro_batches: list[list[Example]]) -> dict[str, torch.Tensor]:
    """Return one step's mean loss under "loss", and the gradient of every parameter."""
    pair.student.zero_grad(set_to_none=True)
    sums = accumulate(pair, micro_batches, LOSS)
    found = {n: p.grad.clone() for n, p in pair.student.named_parameters() if p.grad is not None}
    return {"loss": sums.total / sums.num_tokens, **found}


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6, msg=name)


# --- what must not change loss and gradient


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("is_split", [False, True])
def test_duplicating_the_batch_changes_nothing(
    pair: Pair, make_examples: MakeExamples, is_split: bool
) -> None:
    batch = make_examples(UNEVEN)
    once, twice = gradients(pair, [batch]), [batch, batch] if is_split else [batch + batch]
    assert_equal(gradients(pair, twice), once)


@pytest.mark.usefixtures("in_float32")
def test_100_pad_tokens_change_nothing(pair: Pair, make_examples: MakeExamples) -> None:
    short, long = make_examples([(3, 4), (90, 17)])
    assert len(long) - len(short) == 100
    assert_equal(gradients(pair, [[short, long]]), gradients(pair, [[short], [long]]))


@pytest.mark.usefixtures("in_float32")
def test_the_pad_token_does_not_matter(
    pair: Pair, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_examples([(3, 4), (9, 12)])
    before = gradients(pair, [batch])
    assert collate(batch)[0][0, 7:].eq(0).all()

    def collate_with_random_padding(batch: list[Example]) -> tuple[torch.Tensor, ...]:
        input_ids, positions, labels = collate(batch)
        input_ids[0, 7:] = torch.randint(1, 90, input_ids[0, 7:].shape)
        return input_ids, positions, labels

    monkeypatch.setattr(distill, "collate", collate_with_random_padding)
    assert_equal(gradients(pair, [batch]), before)


@pytest.mark.usefixtures("in_float32")
def test_accumulating_4_micro_batches_gives_the_gradient_of_one(
    pair: Pair, make_examples: MakeExamples
) -> None:
    batch = make_examples(UNEVEN)
    assert_equal(gradients(pair, [[example] for example in batch]), gradients(pair, [batch]))


@pytest.mark.usefixtures("in_float32")
def test_slicing_the_head_changes_nothing(
    pair: Pair, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_examples(UNEVEN)
    whole = gradients(pair, [batch])
    monkeypatch.setattr(distill, "HEAD_SLICE", 3)
    assert_equal(gradients(pair, [batch]), whole)


@pytest.mark.usefixtures("in_float32")
def test_loss_is_that_of_the_plain_models(pair: Pair, make_examples: MakeExamples) -> None:
    (example,) = make_examples([(4, 5)])
    input_ids = torch.tensor([example.prompt_token_ids + example.completion_token_ids])
    with torch.inference_mode():
        student, teacher = (m(input_ids).logits[0, 3:-1] for m in (pair.student, pair.teacher))
    expected = LOSS(student, teacher, torch.tensor(example.completion_token_ids))
    sums = accumulate(pair, [[example]], LOSS)
    assert sums.num_tokens == 5
    for name in ("total", "soft", "hard"):
        assert float(getattr(sums, name)) == pytest.approx(float(getattr(expected, name)), rel=1e-5)


def test_bfloat16_autocast_stays_close_to_float32(
    pair: Pair, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_examples(UNEVEN)
    rounded = gradients(pair, [batch])
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    exact = gradients(pair, [batch])
    assert rounded["loss"].dtype == torch.float32
    assert float(rounded["loss"]) != float(exact["loss"]), "autocast did nothing"
    for name, value in exact.items():
        cosine = torch.cosine_similarity(rounded[name].flatten(), value.flatten(), dim=0)
        assert cosine > 0.99, name


# --- collate: which positions count


def test_one_token_completion_counts_only_the_position_before_it() -> None:
    input_ids, positions, labels = collate([Example((11, 12, 13), (14,))])
    assert input_ids.tolist() == [[11, 12, 13]]
    assert (positions.tolist(), labels.tolist()) == ([2], [14])


@pytest.mark.usefixtures("in_float32")
def test_one_token_completion_sends_gradient_into_that_position_alone(pair: Pair) -> None:
    hidden = {}
    run = pair.hidden

    def spy(input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden["student"], target = run(input_ids)
        hidden["student"].retain_grad()
        return hidden["student"], target

    pair.hidden = spy  # type: ignore[method-assign]
    accumulate(pair, [[Example((11, 12, 13), (14,)), Example((11,), (12, 13, 14, 15))]], LOSS)
    positions = hidden["student"].grad.abs().sum(-1) > 0
    assert positions.tolist() == [[False, False, True, False], [True, True, True, True]]


def test_eos_counts_and_so_does_every_token_that_looks_like_padding() -> None:
    eos = pad = 0
    batch = [Example((5, pad, 6), (7, pad, eos)), Example((5,), (6, 7, 8, pad, 9, eos))]
    input_ids, positions, labels = collate(batch)
    assert input_ids.tolist() == [[5, 0, 6, 7, 0, 0], [5, 6, 7, 8, 0, 9]]
    assert positions.tolist() == [2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert labels.tolist() == [7, pad, eos, 6, 7, 8, pad, 9, eos]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5))
def test_every_completion_token_is_predicted_from_the_token_before_it(
    lengths: list[tuple[int, int]],
) -> None:
    ids = itertools.count(1)
    batch = [
        Example(tuple(itertools.islice(ids, p)), tuple(itertools.islice(ids, c)))
        for p, c in lengths
    ]
    input_ids, positions, labels = collate(batch)
    assert (input_ids.flatten()[positions] + 1).tolist() == labels.tolist()
    assert labels.tolist() == [token for e in batch for token in e.completion_token_ids]


# --- shared layers


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_shared_layers_change_no_hidden_state(
    make_pair: Callable[..., Pair], architecture: str
) -> None:
    input_ids = torch.randint(90, (2, 9), generator=torch.Generator().manual_seed(0))
    apart, shared = make_pair(0, architecture), make_pair(1, architecture)
    for actual, expected in zip(shared.hidden(input_ids), apart.hidden(input_ids), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.usefixtures("in_float32")
def test_shared_layers_leave_the_other_gradients_as_they_are(
    make_pair: Callable[..., Pair], make_examples: MakeExamples
) -> None:
    batch = make_examples(UNEVEN)
    apart, shared = gradients(make_pair(0), [batch]), gradients(make_pair(1), [batch])
    names = {name for name in apart if "layers.1." in name} | {"loss", "model.norm.weight"}
    assert shared.keys() == names
    assert_equal(shared, {name: apart[name] for name in names})


@pytest.mark.parametrize("architecture", ["llama", "llama-untied"])
def test_shared_parameters_and_the_teacher_stay_as_they_are(
    make_pair: Callable[..., Pair], make_examples: MakeExamples, architecture: str
) -> None:
    pair = make_pair(1, architecture)
    student, teacher = (copy.deepcopy(m.state_dict()) for m in (pair.student, pair.teacher))
    train(pair, make_examples(UNEVEN), TrainingPlan(tokens_per_step=4, weight_decay=0.1))
    changed = {n for n, value in pair.student.state_dict().items() if not value.equal(student[n])}
    assert changed == {n for n in student if "layers.1." in n or n == "model.norm.weight"}
    assert all(value.equal(teacher[n]) for n, value in pair.teacher.state_dict().items())
    assert all(p.grad is None for p in pair.teacher.parameters())


# --- training


def test_training_reduces_the_kl(pair: Pair, make_examples: MakeExamples) -> None:
    plan = TrainingPlan(
        num_epochs=15, learning_rate=3e-3, tokens_per_step=64, loss=DistillationLoss(alpha=1.0)
    )
    records = train(pair, make_examples([(4, 12)] * 16), plan)
    assert records[-1].soft < 0.5 * records[0].soft
    assert not pair.student.training


def test_same_seed_gives_the_same_weights(
    make_pair: Callable[..., Pair], make_examples: MakeExamples
) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        pair = make_pair()
        plan = TrainingPlan(num_epochs=2, tokens_per_step=5, tokens_per_micro_batch=20, seed=seed)
        train(pair, make_examples(UNEVEN), plan)
        return dict(pair.student.state_dict())

    first, again, other = weights(1), weights(1), weights(2)
    assert all(first[name].equal(again[name]) for name in first)
    assert not all(first[name].equal(other[name]) for name in first)


def test_every_step_is_reported(pair: Pair, make_examples: MakeExamples) -> None:
    examples = make_examples(UNEVEN)
    plan = TrainingPlan(num_epochs=2, tokens_per_step=6, learning_rate=1e-2, loss=LOSS)
    shown: list[tuple[StepRecord, int]] = []
    records = train(pair, examples, plan, lambda *step: shown.append(step))
    assert shown == [(record, len(records)) for record in records]
    assert [record.step for record in records] == list(range(len(records)))
    assert sum(record.num_tokens for record in records) == 2 * sum(c for _, c in UNEVEN)
    for record in records:
        factor = schedule(record.step, len(records), plan.warmup_share)
        assert record.learning_rate == pytest.approx(plan.learning_rate * factor)
        assert record.total == pytest.approx(0.5 * 4 * record.soft + 0.5 * record.hard)


# --- steps and learning rate

many_lengths = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=40)


def numbered(lengths: list[tuple[int, int]]) -> list[Example]:
    """Examples that differ, whatever their lengths."""
    return [Example((i,) * p, (i,) * c) for i, (p, c) in enumerate(lengths)]


@given(many_lengths, st.integers(0, 3))
def test_every_example_is_in_exactly_one_step_of_an_epoch(
    lengths: list[tuple[int, int]], epoch: int
) -> None:
    examples = numbered(lengths)
    steps = plan_steps(examples, TrainingPlan(tokens_per_step=50), epoch)
    planned = [example for step in steps for batch in step for example in batch]
    assert sorted(planned, key=examples.index) == examples


@given(many_lengths)
def test_a_step_is_full_and_its_micro_batches_are_not_too_large(
    lengths: list[tuple[int, int]],
) -> None:
    plan = TrainingPlan(tokens_per_step=50, tokens_per_micro_batch=64)
    steps = list(plan_steps(numbered(lengths), plan, 0))
    tokens = [sum(len(e.completion_token_ids) for b in step for e in b) for step in steps]
    assert all(count >= 50 for count in tokens[:-1])
    for batch in itertools.chain(*steps):
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= 64


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    examples = numbered([(2, 3)] * 30)

    def order(seed: int, epoch: int) -> list[list[list[Example]]]:
        return list(plan_steps(examples, TrainingPlan(seed=seed, tokens_per_step=9), epoch))

    assert order(0, 0) == order(0, 0)
    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_learning_rate_rises_linearly_and_falls_to_a_tenth() -> None:
    factors = [schedule(step, 1000, 0.05) for step in range(1000)]
    assert factors[:50] == pytest.approx([(step + 1) / 50 for step in range(50)])
    assert factors[49:] == sorted(factors[49:], reverse=True)
    assert factors[50 + 475] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize(("num_steps", "warmup_share"), [(1, 0.0), (1, 0.05), (2, 0.9), (3, 0.0)])
def test_the_shortest_trainings_have_a_learning_rate(num_steps: int, warmup_share: float) -> None:
    factors = [schedule(step, num_steps, warmup_share) for step in range(num_steps)]
    assert all(0.1 <= factor <= 1 for factor in factors)
    assert max(factors) == 1
