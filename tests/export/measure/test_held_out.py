from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from bundle.hashing import hash_json
from estimators.bootstrap import bootstrap_ratio
from estimators.divergence import exact_kl
from export.measure.held_out import MAX_POSITIONS, HeldOut, evaluate
from export.measure.summary import ModelQuality, to_json
from export.run.errors import ExportError
from export.teacher.examples import Example
from serve.models.onnx_backend import OnnxBackend
from serve.models.torch_backend import TorchBackend
from serve.text.real_tokens import RealTokens
from tests.support.backends import FakeBackend
from tests.support.random_models import random_examples, random_model

VOCAB_SIZE = 20


LENGTHS = [(3, 8), (1, 2), (8, 1), (4, 4), (6, 7), (2, 5), (5, 3), (7, 6), (1, 8), (8, 8)]


def small_ids(token_ids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(token_id % VOCAB_SIZE for token_id in token_ids)


EXAMPLES = [
    Example(small_ids(e.prompt_token_ids), small_ids(e.completion_token_ids))
    for e in random_examples(LENGTHS)
]


def table_backend(seed: int, max_num_seqs: int = 4) -> FakeBackend:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator)
    return FakeBackend(logits, max_model_len=256, max_num_seqs=max_num_seqs)


def tokens_before(example: Example) -> list[int]:
    """The tokens whose logits predict the completion."""
    text = example.prompt_token_ids + example.completion_token_ids
    return list(text[len(example.prompt_token_ids) - 1 : -1])


def table_kls(reference: FakeBackend, model: FakeBackend, example: Example) -> list[float]:
    """The slow obvious way: row by row from the tables of logits."""
    return [
        float(exact_kl(reference.logits[token].numpy(), model.logits[token].numpy()))
        for token in tokens_before(example)
    ]


def silent(done: int, total: int) -> None:
    """Show no progress."""


def pair_of(a: FakeBackend, b: FakeBackend, examples: list[Example]) -> ModelQuality:
    return evaluate({"a": a, "b": b}, ("a",), examples, silent).agreements["a", "b"]


# --- agreement


def test_held_out_kl_is_over_all_completion_tokens_in_the_named_direction() -> None:
    backends = {"teacher": table_backend(0), "student": table_backend(1)}
    found = evaluate(backends, ("teacher", "student"), EXAMPLES, silent).agreements
    assert found.keys() == {("teacher", "student"), ("student", "teacher")}
    for (reference, model), agreement in found.items():
        pair = backends[reference], backends[model]
        kls = [kl for e in EXAMPLES for kl in table_kls(*pair, e)]
        assert agreement.forward_kl == pytest.approx(np.mean(kls))
        assert agreement.num_tokens == len(kls)


def test_held_out_interval_is_over_prompts() -> None:
    a, b = table_backend(0), table_backend(1)
    sums = [sum(table_kls(a, b, e)) for e in EXAMPLES]
    sizes = [len(e.completion_token_ids) for e in EXAMPLES]
    found, expected = pair_of(a, b, EXAMPLES).forward_kl_ci, bootstrap_ratio(sums, sizes).interval
    assert found is not None
    assert expected is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_held_out_completions_of_one_prompt_are_one_cluster() -> None:
    again = [Example(EXAMPLES[0].prompt_token_ids, e.completion_token_ids) for e in EXAMPLES]
    held_out = evaluate({"a": table_backend(0), "b": table_backend(1)}, ("a",), again, silent)
    assert held_out.agreements["a", "b"].forward_kl_ci is None
    (record,) = held_out.prompts
    assert record.num_tokens == held_out.num_tokens
    assert record.forward_kl["a", "b"] == pytest.approx(held_out.agreements["a", "b"].forward_kl)


def test_flips_are_counted_with_the_margin_of_the_reference() -> None:
    a, b = table_backend(0), table_backend(0)
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


def test_flips_that_are_few_have_no_p90() -> None:
    a, b = table_backend(0), table_backend(0)
    b.logits[1, 5] = 99.0
    margins = pair_of(a, b, [Example((1,), (2, 3))]).flip_margins
    assert margins is not None
    assert margins.p90 is None
    assert margins.median == margins.max > 0


@pytest.mark.parametrize("num_tokens", [99, 100])
def test_p99_needs_a_hundred_tokens(num_tokens: int) -> None:
    """And of more than `MAX_POSITIONS` the numbers are those of all."""
    a, b = table_backend(0), table_backend(1)
    example = Example((0,), tuple(i % VOCAB_SIZE for i in range(num_tokens)))
    kls, quality = table_kls(a, b, example), pair_of(a, b, [example])
    expected = np.quantile(kls, 0.99) if num_tokens >= 100 else None
    assert quality.forward_kl_p99 == pytest.approx(expected)
    assert num_tokens > MAX_POSITIONS and quality.forward_kl == pytest.approx(np.mean(kls))
    flips = [a.logits[i].argmax() != b.logits[i].argmax() for i in tokens_before(example)]
    assert quality.num_flips == sum(flips) > 0


def test_held_out_holds_every_model_against_every_reference_but_itself() -> None:
    backends = {name: table_backend(seed) for seed, name in enumerate("abc")}
    found = evaluate(backends, ("a", "b"), EXAMPLES, silent).agreements
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "a"), ("b", "c")]


def test_held_out_model_agrees_with_itself_exactly() -> None:
    agreement = pair_of(table_backend(0), table_backend(0), EXAMPLES)
    assert (agreement.forward_kl, agreement.argmax_agreement) == (0.0, 1.0)
    assert (agreement.forward_kl_ci, agreement.flip_margins) == (None, None)


def test_perplexity_is_of_the_completion_tokens() -> None:
    held_out = evaluate({"a": table_backend(0)}, (), EXAMPLES, silent)
    logprobs = table_backend(0).logits.double().log_softmax(-1)
    nll = [
        -float(logprobs[before, token])
        for e in EXAMPLES
        for before, token in zip(tokens_before(e), e.completion_token_ids, strict=True)
    ]
    assert held_out.perplexity == {"a": pytest.approx(math.exp(np.mean(nll)))}


# --- batches


@pytest.mark.parametrize("max_num_seqs", [1, 3, 64])
def test_held_out_kl_is_the_same_for_any_number_of_rows(max_num_seqs: int) -> None:
    a, b = table_backend(0, max_num_seqs), table_backend(1, 5)
    kls = [kl for e in EXAMPLES for kl in table_kls(a, b, e)]
    assert pair_of(a, b, EXAMPLES).forward_kl == pytest.approx(np.mean(kls))


def test_held_out_progress_counts_prompts() -> None:
    shown: list[tuple[int, int]] = []
    backends = {"a": table_backend(0), "b": table_backend(1)}
    evaluate(backends, ("a",), EXAMPLES, lambda *progress: shown.append(progress))
    assert shown == [(4, 10), (8, 10), (10, 10)]


def test_held_out_batches_keep_within_the_memory_for_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    examples = [Example((1,), (2,) * size) for size in (3, 3, 9, 1, 2)]
    monkeypatch.setattr("export.measure.held_out.MAX_LOGITS_BYTES", 6 * VOCAB_SIZE * 4 * 2)
    shown: list[int] = []
    backends = {"a": table_backend(0), "b": table_backend(1)}
    evaluate(backends, ("a",), examples, lambda done, total: shown.append(done))
    assert shown == [2, 3, 5]


# --- the engine's path


def test_model_whose_paths_differ_is_judged_by_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is decoding that users get: the first token aside, each one is a decode step."""
    noisy = table_backend(0)

    def forward(*arguments: Any) -> torch.Tensor:
        logits = FakeBackend.forward(noisy, *arguments)
        logits[:, 0] += 3.0 * any(arguments[2])
        return logits

    monkeypatch.setattr(noisy, "forward", forward)
    assert pair_of(table_backend(0), noisy, EXAMPLES).forward_kl > 0.01


def test_logits_that_are_not_numbers_make_no_number() -> None:
    broken = table_backend(1)
    broken.logits[:] = torch.nan
    held_out = evaluate({"a": table_backend(0), "b": broken}, ("a",), EXAMPLES, silent)
    agreement = held_out.agreements["a", "b"]
    assert math.isnan(agreement.forward_kl)
    assert (agreement.forward_kl_ci, agreement.forward_kl_p99) == (None, None)
    assert to_json(held_out.quality)["a"]["b"]["forward_kl"] is None
    assert held_out.rows()[0]["forward_kl"]["a"]["b"] is None


def test_perplexity_beyond_all_numbers_is_infinite() -> None:
    sure = table_backend(0)
    sure.logits[:, 0] = 1e4
    held_out = evaluate({"a": sure}, (), [Example((1,), (2,))], silent)
    assert held_out.perplexity == {"a": math.inf}
    assert to_json(held_out.perplexity) == {"a": None}


def test_held_out_without_text_is_refused() -> None:
    with pytest.raises(ExportError, match="no held-out text"):
        evaluate({"a": table_backend(0)}, (), [], silent)


def test_failed_model_ends_the_evaluation() -> None:
    broken = table_backend(1)
    broken.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate({"a": table_backend(0), "b": broken}, ("a",), EXAMPLES, silent)


def test_held_out_float_graph_agrees_with_torch(exported_llama: Any) -> None:
    size = {"device": "cpu", "max_num_seqs": 4, "max_model_len": 64}
    student = TorchBackend.load(exported_llama.student_dir, dtype=torch.float32, **size)
    backends = {
        "student": student,
        "fp32": OnnxBackend.load(exported_llama.variants["fp32"], **size),
    }
    examples = random_examples([(5, 20), (30, 3), (9, 14)])
    held_out = evaluate(backends, ("student",), examples, silent)
    agreement = held_out.agreements["student", "fp32"]
    assert abs(agreement.forward_kl) < 1e-6
    assert agreement.argmax_agreement == 1.0
    assert held_out.perplexity["fp32"] == pytest.approx(held_out.perplexity["student"], rel=1e-4)


def test_held_out_heads_of_two_sizes_are_measured_over_shared_tokens() -> None:
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
def held_out() -> HeldOut:
    backends = {"teacher": table_backend(0), "student": table_backend(1)}
    return evaluate(backends, ("teacher",), EXAMPLES, silent)


def test_prompts_are_known_by_their_token_ids(held_out: HeldOut) -> None:
    assert len(held_out.prompts) == 10
    assert held_out.prompts_sha256 == hash_json([list(e.prompt_token_ids) for e in EXAMPLES])


def test_held_out_rows_add_up_to_the_summary(held_out: HeldOut) -> None:
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
