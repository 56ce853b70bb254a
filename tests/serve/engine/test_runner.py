"""NaN in the cache: it stays with the request that it is of, whoever uses the row afterwards.

On a real model, whose attention multiplies hidden positions by 0 and so keeps their NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from serve.engine.engine import Engine
from serve.engine.scoring import ScoringRequest
from serve.engine.sequence import FinishReason
from serve.models.kv_cache import KVCache
from serve.models.torch_backend import TorchBackend
from tests.support.engines import EventReader, backend_of, run, submit

VOCAB_SIZE = 60
POISON = 59
"""Its embedding is NaN."""
BAD = (5, POISON, 7, 8, 9, 10, 11, 12)
LONG_BAD = (POISON, *range(30))
GOOD = [(1, 2, 3), (4, 5), (6,), *(tuple(range(i, 30)) for i in range(10, 15))]


@pytest.fixture(scope="module")
def backend() -> TorchBackend:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.model.embed_tokens.weight.data[POISON] = torch.nan
    return TorchBackend.take(model, device="cpu", max_num_seqs=3, max_model_len=64)


@pytest.fixture
def engine(backend: TorchBackend) -> Engine:
    """An engine whose rows are as new, and that takes long prompts in chunks of 8."""
    backend.cache.tensor.zero_()
    return Engine(
        backend, eos_token_ids=frozenset(), max_pass_tokens=8, max_prefix_cache_bytes=0,
        scores_in_one_pass=True,
    )  # fmt: skip


def ask(engine: Engine, prompt: tuple[int, ...], num_samples: int = 1) -> EventReader:
    """Ask for tokens, but never the poison itself."""
    settings = {"num_samples": num_samples, "max_tokens": 6, "seed": 1, "top_k": 20}
    return submit(engine, str(prompt), prompt, **settings)


def answers(engine: Engine) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Use every kind of row; return tokens and log-probabilities."""
    readers = [ask(engine, prompt) for prompt in GOOD]
    future = engine.score(ScoringRequest("s", GOOD[0], tuple([(1, 2, 3)] * 10)))
    run(engine)
    ended = [reader.endings[0] for reader in readers]
    found = [(one.token_ids, one.logprobs) for one in ended]
    return [*found, *(((), tuple(score.logprobs)) for score in future.result(0))]


def fail_short(engine: Engine) -> None:
    reader = ask(engine, BAD, num_samples=3)
    run(engine)
    assert reader.reasons == [FinishReason.ERROR] * 3


def fail_long(engine: Engine) -> None:
    readers = [ask(engine, (*LONG_BAD, i)) for i in range(4)]
    run(engine)
    assert [reader.reasons for reader in readers] == [[FinishReason.ERROR]] * 4


def cancel_long(engine: Engine) -> None:
    readers = [ask(engine, (*LONG_BAD, i)) for i in range(3)]
    for _ in range(9):
        engine.core.step()
    for i in range(3):
        engine.cancel(str((*LONG_BAD, i)))
    run(engine)
    assert [reader.reasons for reader in readers] == [[FinishReason.CANCELLED]] * 3


def score_in_one_pass(engine: Engine) -> None:
    futures = [
        engine.score(ScoringRequest("a", (1, 2), ((3, POISON, 5, 6),) * 8)),
        engine.score(ScoringRequest("b", BAD, ((3, 4, 5),) * 8)),
    ]
    run(engine)
    assert all(np.isnan(s.logprobs).any() for future in futures for s in future.result(0))


def score_by_decoding(engine: Engine) -> None:
    engine.scores_in_one_pass = False
    lengths = (9, 4, 6)  # so that rows move while others hold NaN
    completions = tuple((3, POISON, *range(4, 4 + length)) for length in lengths)
    future = engine.score(ScoringRequest("a", (1, 2), completions))
    run(engine)
    engine.scores_in_one_pass = True
    assert all(np.isnan(score.logprobs).any() for score in future.result(0))


def fail_the_engine(engine: Engine) -> None:
    engine.scores_in_one_pass = False
    engine.score(ScoringRequest("a", (1, 2), ((3, POISON, 4, 5, 6, 7),) * 3))
    for _ in range(4):
        engine.core.step()
    engine.scores_in_one_pass = True
    engine.core.recover()


def break_behind_the_pass(engine: Engine, error: Exception, prompt: tuple[int, ...]) -> None:
    """Have a pass write NaN, and fail before anybody sees its logits."""
    backend = backend_of(engine)
    forward = backend.forward

    def failing(*args: Any) -> torch.Tensor:
        forward(*args)
        raise error

    with patch.object(backend, "forward", failing):
        assert try_to_answer(engine, prompt) == [FinishReason.ERROR]


def try_to_answer(engine: Engine, prompt: tuple[int, ...]) -> list[FinishReason]:
    reader = ask(engine, prompt)
    while not reader.endings:
        engine.step()
    return reader.reasons


def run_out_of_memory(engine: Engine) -> None:
    break_behind_the_pass(engine, torch.OutOfMemoryError(), BAD)
    break_behind_the_pass(engine, torch.OutOfMemoryError(), LONG_BAD)


def fail_behind_the_pass(engine: Engine) -> None:
    break_behind_the_pass(engine, RuntimeError(), BAD)
    ask(engine, GOOD[0])  # or too many steps fail in a row
    run(engine)


def sample_without_memory(engine: Engine) -> None:
    with patch.object(engine.core.runner.sampler, "sample", side_effect=torch.OutOfMemoryError()):
        assert try_to_answer(engine, BAD) == [FinishReason.ERROR]


@pytest.mark.parametrize(
    "poison",
    [
        fail_short, fail_long, cancel_long, score_in_one_pass, score_by_decoding, fail_the_engine,
        run_out_of_memory, fail_behind_the_pass, sample_without_memory,
    ],
)  # fmt: skip
def test_row_that_held_nan_serves_the_next_as_if_it_were_new(
    engine: Engine, poison: Callable[[Engine], None]
) -> None:
    expected = answers(engine)
    for _ in range(2):
        poison(engine)
        assert answers(engine) == expected


def test_completion_with_nan_spares_those_of_the_same_request(engine: Engine) -> None:
    good = (3, 4, 5, 6)
    alone = engine.score(ScoringRequest("a", (1, 2), (good,)))
    run(engine)
    long_bad = (3, POISON, *range(4, 20))
    many = engine.score(ScoringRequest("b", (1, 2), (*[long_bad] * 8, *[good] * 3)))
    run(engine)
    for score in many.result(0)[8:]:
        assert score.logprobs.tolist() == alone.result(0)[0].logprobs.tolist()


def test_scrubbing_zeroes_what_is_not_finite_behind_a_position() -> None:
    cache = KVCache(1, (2, 1, 200, 2), torch.float32, torch.device("cpu"))
    cache.tensor.fill_(1.0)
    cache.tensor[0, 1, 0, 10] = torch.nan
    cache.tensor[1, 1, 0, 150] = torch.inf
    cache.scrub(1, 20)
    assert cache.tensor[0, 1, 0, 10].isnan().all()
    cache.scrub(1, 0)
    assert cache.tensor.isfinite().all()
    assert (cache.tensor[:, 1, :, 64:128] == 1).all() and (cache.tensor[:, 0] == 1).all()
