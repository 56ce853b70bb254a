from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from bundle.hashing import hash_json
from estimators.bootstrap import bootstrap_ratio
from estimators.divergence import exact_kl
from export.measure import held_out as module
from export.measure.held_out import HeldOut, evaluate
from export.measure.summary import ModelQuality, to_json
from export.run.errors import ExportError
from export.teacher.examples import Example
from serve.models.backend import ModelInfo
from serve.models.onnx_backend import OnnxBackend
from serve.models.torch_backend import TorchBackend
from serve.text.real_tokens import RealTokens
from tests.support.random_models import random_examples, random_model

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

    def prepare(self) -> None:
        """There is nothing to prepare."""

    def scrub_kv(self, row: int, start: int = 0) -> None:
        """There is no cache."""

    def copy_kv(self, source_row: int, target_row: int, length: int) -> None:
        """There is no cache."""

    def read_kv(self, row: int, start: int, stop: int) -> torch.Tensor:
        return torch.empty(1, 1, stop - start, 0)

    def write_kv(self, row: int, start: int, kv: torch.Tensor) -> None:
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


def tokens_before(example: Example) -> list[int]:
    """The tokens whose logits predict the completion."""
    text = example.prompt_token_ids + example.completion_token_ids
    return list(text[len(example.prompt_token_ids) - 1 : -1])


def table_kls(reference: TableBackend, model: TableBackend, example: Example) -> list[float]:
    """The slow obvious way: row by row from the tables of logits."""
    return [
        float(exact_kl(reference.logits[token].numpy(), model.logits[token].numpy()))
        for token in tokens_before(example)
    ]


def silent(done: int, total: int) -> None:
    """Show no progress."""


def pair_of(a: TableBackend, b: TableBackend, examples: list[Example]) -> ModelQuality:
    return evaluate({"a": a, "b": b}, ("a",), examples, silent).agreements["a", "b"]


# --- agreement


def test_kl_is_over_all_completion_tokens_in_the_named_direction(examples: list[Example]) -> None:
    backends = {"teacher": TableBackend(0), "student": TableBackend(1)}
    found = evaluate(backends, ("teacher", "student"), examples, silent).agreements
    assert found.keys() == {("teacher", "student"), ("student", "teacher")}
    for (reference, model), agreement in found.items():
        pair = backends[reference], backends[model]
        kls = [kl for e in examples for kl in table_kls(*pair, e)]
        assert agreement.forward_kl == pytest.approx(np.mean(kls))
        assert agreement.num_tokens == len(kls)


def test_reference_values_of_a_known_distribution() -> None:
    """KL(P‖Q) = 0.6348972651 for P = [.7, .2, .1] and Q = [.2, .3, .5]."""
    p, q = TableBackend(0), TableBackend(0)
    for backend, row in ((p, [0.7, 0.2, 0.1]), (q, [0.2, 0.3, 0.5])):
        backend.logits = torch.full((VOCAB_SIZE, VOCAB_SIZE), -1e4)
        backend.logits[:, :3] = torch.tensor(row).log()
    held_out = evaluate({"p": p, "q": q}, ("p", "q"), [Example((1,), (0, 1, 2))], silent)
    assert held_out.agreements["p", "q"].forward_kl == pytest.approx(0.6348972651, abs=1e-7)
    assert held_out.agreements["q", "p"].forward_kl == pytest.approx(0.6758058950, abs=1e-7)
    assert held_out.perplexity["p"] == pytest.approx((0.7 * 0.2 * 0.1) ** (-1 / 3))


def test_interval_is_over_prompts(examples: list[Example]) -> None:
    a, b = TableBackend(0), TableBackend(1)
    sums = [sum(table_kls(a, b, e)) for e in examples]
    sizes = [len(e.completion_token_ids) for e in examples]
    found, expected = pair_of(a, b, examples).forward_kl_ci, bootstrap_ratio(sums, sizes).interval
    assert found is not None
    assert expected is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_completions_of_one_prompt_are_one_cluster(examples: list[Example]) -> None:
    again = [Example(examples[0].prompt_token_ids, e.completion_token_ids) for e in examples]
    held_out = evaluate({"a": TableBackend(0), "b": TableBackend(1)}, ("a",), again, silent)
    assert held_out.agreements["a", "b"].forward_kl_ci is None
    (record,) = held_out.prompts
    assert record.num_tokens == held_out.num_tokens
    assert record.forward_kl["a", "b"] == pytest.approx(held_out.agreements["a", "b"].forward_kl)


def test_flips_are_counted_with_the_margin_of_the_reference() -> None:
    a, b = TableBackend(0), TableBackend(0)
    a.logits[:] = 0.0
    a.logits[:, 4] = torch.arange(VOCAB_SIZE) * 0.25  # margin 0.25 · newest token
    b.logits = a.logits.clone()
    b.logits[1:12, 5] = 99.0
    agreement = pair_of(a, b, [Example((1,), tuple(range(2, 20)))])
    assert (agreement.num_flips, agreement.num_tokens) == (11, 18)
    assert agreement.argmax_agreement == pytest.approx(7 / 18)
    margins = agreement.flip_margins
    assert margins is not None
    assert (margins.median, margins.p90, margins.max) == (1.5, 2.5, 2.75)


def test_few_flips_have_no_p90() -> None:
    a, b = TableBackend(0), TableBackend(0)
    b.logits[1, 5] = 99.0
    margins = pair_of(a, b, [Example((1,), (2, 3))]).flip_margins
    assert margins is not None
    assert margins.p90 is None
    assert margins.median == margins.max > 0


@pytest.mark.parametrize("num_tokens", [99, 100])
def test_p99_needs_a_hundred_tokens(num_tokens: int) -> None:
    a, b = TableBackend(0), TableBackend(1)
    example = Example((0,), tuple(i % VOCAB_SIZE for i in range(num_tokens)))
    expected = np.quantile(table_kls(a, b, example), 0.99) if num_tokens >= 100 else None
    assert pair_of(a, b, [example]).forward_kl_p99 == pytest.approx(expected)


def test_every_model_is_held_against_every_reference_but_itself(examples: list[Example]) -> None:
    backends = {name: TableBackend(seed) for seed, name in enumerate("abc")}
    found = evaluate(backends, ("a", "b"), examples, silent).agreements
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "a"), ("b", "c")]


def test_same_model_agrees_with_itself_exactly(examples: list[Example]) -> None:
    agreement = pair_of(TableBackend(0), TableBackend(0), examples)
    assert (agreement.forward_kl, agreement.argmax_agreement) == (0.0, 1.0)
    assert (agreement.forward_kl_ci, agreement.flip_margins) == (None, None)


def test_perplexity_is_of_the_completion_tokens(examples: list[Example]) -> None:
    held_out = evaluate({"a": TableBackend(0)}, (), examples, silent)
    logprobs = TableBackend(0).logits.double().log_softmax(-1)
    nll = [
        -float(logprobs[before, token])
        for e in examples
        for before, token in zip(tokens_before(e), e.completion_token_ids, strict=True)
    ]
    assert held_out.perplexity == {"a": pytest.approx(math.exp(np.mean(nll)))}


# --- batches


@pytest.mark.parametrize("max_num_seqs", [1, 3, 64])
def test_number_of_rows_does_not_change_the_result(
    examples: list[Example], max_num_seqs: int
) -> None:
    a, b = TableBackend(0, max_num_seqs), TableBackend(1, 5)
    kls = [kl for e in examples for kl in table_kls(a, b, e)]
    assert pair_of(a, b, examples).forward_kl == pytest.approx(np.mean(kls))


def test_slices_of_positions_do_not_change_the_result(
    examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pair_of(TableBackend(0), TableBackend(1), examples)
    monkeypatch.setattr(module, "MAX_POSITIONS", 2)
    found = pair_of(TableBackend(0), TableBackend(1), examples)
    assert found.forward_kl == pytest.approx(expected.forward_kl)
    assert found.num_flips == expected.num_flips > 0


def test_progress_counts_prompts(examples: list[Example]) -> None:
    shown: list[tuple[int, int]] = []
    backends = {"a": TableBackend(0), "b": TableBackend(1)}
    evaluate(backends, ("a",), examples, lambda *progress: shown.append(progress))
    assert shown == [(4, 10), (8, 10), (10, 10)]


def test_batches_keep_within_the_memory_for_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [Example((1,), (2,) * size) for size in (3, 3, 9, 1, 2)]
    monkeypatch.setattr(module, "MAX_LOGITS_BYTES", 6 * VOCAB_SIZE * 4 * 2)
    shown: list[int] = []
    backends = {"a": TableBackend(0), "b": TableBackend(1)}
    evaluate(backends, ("a",), examples, lambda done, total: shown.append(done))
    assert shown == [2, 3, 5]


# --- the engine's path


def test_model_whose_paths_differ_is_judged_by_decoding(examples: list[Example]) -> None:
    """It is decoding that users get: the first token aside, each one is a decode step."""
    assert pair_of(TableBackend(0), TableBackend(0, path_noise=3.0), examples).forward_kl > 0.01


def test_logits_that_are_not_numbers_make_no_number(examples: list[Example]) -> None:
    broken = TableBackend(1)
    broken.logits[:] = torch.nan
    held_out = evaluate({"a": TableBackend(0), "b": broken}, ("a",), examples, silent)
    agreement = held_out.agreements["a", "b"]
    assert math.isnan(agreement.forward_kl)
    assert (agreement.forward_kl_ci, agreement.forward_kl_p99) == (None, None)
    assert to_json(held_out.quality)["a"]["b"]["forward_kl"] is None
    assert held_out.rows()[0]["forward_kl"]["a"]["b"] is None


def test_perplexity_beyond_all_numbers_is_infinite() -> None:
    sure = TableBackend(0)
    sure.logits[:, 0] = 1e4
    held_out = evaluate({"a": sure}, (), [Example((1,), (2,))], silent)
    assert held_out.perplexity == {"a": math.inf}
    assert to_json(held_out.perplexity) == {"a": None}


def test_no_text_is_refused() -> None:
    with pytest.raises(ExportError, match="no held-out text"):
        evaluate({"a": TableBackend(0)}, (), [], silent)


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


def test_float_graph_agrees_with_torch(exported: Any) -> None:
    size = {"device": "cpu", "max_num_seqs": 4, "max_model_len": 64}
    student = TorchBackend.load(exported.student_dir, dtype=torch.float32, **size)
    backends = {"student": student, "fp32": OnnxBackend.load(exported.variants["fp32"], **size)}
    examples = random_examples([(5, 20), (30, 3), (9, 14)])
    held_out = evaluate(backends, ("student",), examples, silent)
    agreement = held_out.agreements["student", "fp32"]
    assert abs(agreement.forward_kl) < 1e-6
    assert agreement.argmax_agreement == 1.0
    assert held_out.perplexity["fp32"] == pytest.approx(held_out.perplexity["student"], rel=1e-4)


def test_heads_of_two_sizes_are_measured_over_the_tokens_that_they_share() -> None:
    examples = random_examples([(5, 20), (30, 3)])

    def measure(teacher_rows: int, student_rows: int, num_tokens: int) -> HeldOut:
        backends = {}
        for seed, (name, rows) in enumerate({"t": teacher_rows, "s": student_rows}.items()):
            model = random_model("llama-untied", num_layers=1, seed=seed)
            model.resize_token_embeddings(rows)
            with torch.no_grad():
                model.lm_head.weight[97:] = 20 * model.lm_head.weight[: rows - 97]
            size = {"device": "cpu", "max_num_seqs": 4, "max_model_len": 64}
            backends[name] = TorchBackend.take(model, real_tokens=RealTokens(num_tokens), **size)
        return evaluate(backends, ("t",), examples, silent)

    assert measure(128, 112, 97) == measure(97, 97, 97)
    assert measure(112, 112, 112) != measure(97, 97, 97), "nobody is loud"


# --- what is written


@pytest.fixture
def held_out(examples: list[Example]) -> HeldOut:
    backends = {"teacher": TableBackend(0), "student": TableBackend(1)}
    return evaluate(backends, ("teacher",), examples, silent)


def test_prompts_are_known_by_their_token_ids(held_out: HeldOut, examples: list[Example]) -> None:
    assert len(held_out.prompts) == 10
    assert held_out.prompts_sha256 == hash_json([list(e.prompt_token_ids) for e in examples])


def test_rows_add_up_to_the_summary(held_out: HeldOut) -> None:
    rows, agreement = held_out.rows(), held_out.agreements["teacher", "student"]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert [row["prompt"] for row in rows] == list(range(10))
    sizes = np.array([row["num_tokens"] for row in rows])
    assert sizes.sum() == held_out.num_tokens
    kls = np.array([row["forward_kl"]["teacher"]["student"] for row in rows])
    assert kls @ sizes / sizes.sum() == pytest.approx(agreement.forward_kl)
    flips = sum(row["num_flips"]["teacher"]["student"] for row in rows)
    assert flips == agreement.num_flips
    nll = np.array([row["nll"]["student"] for row in rows])
    perplexity = held_out.perplexity["student"]
    assert math.exp(nll @ sizes / sizes.sum()) == pytest.approx(perplexity)
