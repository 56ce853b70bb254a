from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from export.distill import Example
from export.evaluate import Agreement, evaluate
from export.losses import exact_forward_kl
from serve.backend import ModelInfo
from serve.onnx_backend import OnnxBackend

VOCAB_SIZE = 20


class TableBackend:
    """Logits depend on the newest token alone; `path_noise` is added to those of a decode step."""

    def __init__(self, seed: int, max_num_seqs: int = 4, path_noise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = 2 * torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator)
        self.path_noise = path_noise
        self.num_tokens_behind_others = 0
        self.info = ModelInfo("fake", "cpu", "float32", 0, VOCAB_SIZE, 256, max_num_seqs)

    def forward(
        self,
        first_row: int,
        new_token_ids: Sequence[Sequence[int]],
        past_lengths: Sequence[int],
        logit_indices: Sequence[Sequence[int]] | None = None,
    ) -> torch.Tensor:
        wanted = logit_indices or [[len(ids) - 1] for ids in new_token_ids]
        tokens = [ids[i] for ids, at in zip(new_token_ids, wanted, strict=True) for i in at]
        logits = self.logits[tokens].clone()
        if any(past_lengths):
            logits[:, 0] += self.path_noise
        return logits

    def copy_kv(self, source_row: int, target_row: int, length: int) -> None:
        """There is no cache."""


@pytest.fixture
def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (10, 2), generator=generator).tolist()
    return [
        Example(
            *(tuple(torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist()) for n in pair)
        )
        for pair in lengths
    ]


def expected_agreement(
    reference: torch.Tensor, model: torch.Tensor, examples: list[Example]
) -> Agreement:
    """The slow obvious way: row by row from the tables of logits."""
    before = [
        token
        for e in examples
        for token in (e.prompt_token_ids + e.completion_token_ids)[len(e.prompt_token_ids) - 1 : -1]
    ]
    kl = exact_forward_kl(model[before], reference[before]).mean()
    same = reference[before].argmax(-1) == model[before].argmax(-1)
    return Agreement(float(kl), float(same.double().mean()), len(before))


def silent(done: int, total: int) -> None:
    """Show no progress."""


def test_agreement_is_over_all_completion_tokens_in_the_named_direction(
    examples: list[Example],
) -> None:
    backends = {"teacher": TableBackend(0), "student": TableBackend(1)}
    found = evaluate(backends, ("teacher", "student"), examples, silent)
    assert found.keys() == {("teacher", "student"), ("student", "teacher")}
    for (reference, model), agreement in found.items():
        tables = backends[reference].logits, backends[model].logits
        expected = expected_agreement(*tables, examples)
        assert agreement.forward_kl == pytest.approx(expected.forward_kl)
        assert agreement.argmax_agreement == pytest.approx(expected.argmax_agreement)
        assert agreement.num_tokens == expected.num_tokens


def test_every_model_is_held_against_every_reference_but_itself(examples: list[Example]) -> None:
    backends = {name: TableBackend(seed) for seed, name in enumerate("abc")}
    found = evaluate(backends, ("a", "b"), examples, silent)
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "a"), ("b", "c")]


def test_same_model_agrees_with_itself_exactly(examples: list[Example]) -> None:
    (agreement,) = evaluate(
        {"a": TableBackend(0), "b": TableBackend(0)}, ("a",), examples, silent
    ).values()
    assert (agreement.forward_kl, agreement.argmax_agreement) == (0.0, 1.0)


@pytest.mark.parametrize("max_num_seqs", [1, 3, 64])
def test_number_of_rows_does_not_change_the_result(
    examples: list[Example], max_num_seqs: int
) -> None:
    backends = {"a": TableBackend(0, max_num_seqs), "b": TableBackend(1, 5)}
    expected = expected_agreement(backends["a"].logits, backends["b"].logits, examples)
    (agreement,) = evaluate(backends, ("a",), examples, silent).values()
    assert agreement.forward_kl == pytest.approx(expected.forward_kl)


def test_progress_counts_prompts(examples: list[Example]) -> None:
    shown: list[tuple[int, int]] = []
    backends = {"a": TableBackend(0), "b": TableBackend(1)}
    evaluate(backends, ("a",), examples, lambda *progress: shown.append(progress))
    assert shown == [(4, 10), (8, 10), (10, 10)]


def test_model_whose_paths_differ_is_judged_by_decoding(examples: list[Example]) -> None:
    """It is decoding that users get: the first token aside, each one is a decode step."""
    backends = {"a": TableBackend(0), "b": TableBackend(0, path_noise=3.0)}
    (agreement,) = evaluate(backends, ("a",), examples, silent).values()
    assert agreement.forward_kl > 0.01


def test_logits_that_are_not_numbers_make_no_number(examples: list[Example]) -> None:
    broken = TableBackend(1)
    broken.logits[:] = torch.nan
    (agreement,) = evaluate({"a": TableBackend(0), "b": broken}, ("a",), examples, silent).values()
    assert not agreement.forward_kl >= 0


def test_failed_model_ends_the_evaluation(examples: list[Example]) -> None:
    broken = TableBackend(1)
    calls = iter(range(1000))

    def forward(*arguments: Any) -> torch.Tensor:
        if next(calls) > 20:
            raise RuntimeError("out of memory")
        return TableBackend.forward(broken, *arguments)

    broken.forward = forward  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate({"a": TableBackend(0), "b": broken}, ("a",), examples, silent)


def test_float_graph_agrees_with_torch(
    exported: Any, make_examples: Callable[..., list[Example]]
) -> None:
    from serve.torch_backend import TorchBackend

    size = {"device": "cpu", "max_num_seqs": 4, "max_model_len": 64}
    student = TorchBackend.load(exported.student_dir, dtype=torch.float32, **size)
    backends = {"student": student, "fp32": OnnxBackend.load(exported.variants["fp32"], **size)}
    examples = make_examples([(5, 20), (30, 3), (9, 14)])
    agreement = evaluate(backends, ("student",), examples, silent)["student", "fp32"]
    assert abs(agreement.forward_kl) < 1e-6
    assert agreement.argmax_agreement == 1.0
