"""No logit of a padded row, or of an id that no token has, leaves a backend: both runtimes.

The model's head has 340 rows for a tokenizer of 300 tokens that lacks two ids. The rows behind are
loud: among all rows one of them is nearly always the largest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from estimators.divergence import exact_kl
from serve.engine.engine import Engine
from serve.engine.offline import OfflineEngine
from serve.engine.scoring import ScoringRequest
from serve.engine.sequence import FinishedEvent, GenerationRequest
from serve.models.onnx_backend import OnnxBackend
from serve.models.torch_backend import TorchBackend
from serve.sampling.params import SamplingParams
from serve.text.real_tokens import ABSENT_LOGIT, EVERY_ROW, RealTokens
from tests.support.models.tiny_graphs import TINY_SHAPE

NUM_ROWS, NUM_TOKENS, MISSING = 340, 300, (77, 250)
PRESENT = [i for i in range(NUM_TOKENS) if i not in MISSING]
REAL = RealTokens(NUM_TOKENS, MISSING)
KINDS = ("torch", "torch-tied", "onnx", "int8")
LIMITS: dict[str, Any] = {"device": "cpu", "max_num_seqs": 4, "max_model_len": 64}
PROMPT = (5, 9, 200)


def loud_model(*, is_tied: bool) -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=NUM_ROWS,
        max_position_embeddings=256,
        **TINY_SHAPE,
        tie_word_embeddings=is_tied,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # all the same, the exporter would fold them
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        for loud in (*MISSING, *range(NUM_TOKENS, NUM_ROWS)):
            model.lm_head.weight[loud] *= 10
    return model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import onnx

    from export.graph.quantize import WeightOnly, quantize_weights
    from export.graph.surgery import save_onnx
    from export.graph.trace import export_onnx

    folder = tmp_path_factory.mktemp("loud")
    loud_model(is_tied=False).save_pretrained(folder)
    for name in ("onnx", "int8"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text((folder / "config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporters warn about themselves
        path = export_onnx(loud_model(is_tied=False), folder / "onnx", max_model_len=256)
        save_onnx(quantize_weights(onnx.load(path), WeightOnly(8, 128)), folder / "int8")
    return folder


@pytest.fixture
def load(model_dir: Path) -> Callable[..., Any]:
    def load(kind: str, real_tokens: RealTokens = REAL) -> Any:
        if kind == "torch-tied":
            return TorchBackend.take(loud_model(is_tied=True), real_tokens=real_tokens, **LIMITS)
        if kind == "torch":
            return TorchBackend.load(
                model_dir, dtype=torch.float32, real_tokens=real_tokens, **LIMITS
            )
        return OnnxBackend.load(model_dir / kind, num_threads=1, real_tokens=real_tokens, **LIMITS)

    return load


def answer(backend: Any, temperature: float) -> list[FinishedEvent]:
    """Three samples of 20 tokens: an odd batch, of steps of one token."""
    engine, events = Engine(backend, eos_token_ids=frozenset()), list[Any]()
    params = SamplingParams(num_samples=3, max_tokens=20, temperature=temperature, seed=1)
    engine.submit(GenerationRequest("r", PROMPT, params), events.extend)
    for _ in OfflineEngine(engine).run():
        pass
    return [event for event in events if isinstance(event, FinishedEvent)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_no_id_without_a_token_is_drawn(load: Any, kind: str, temperature: float) -> None:
    drawn = [t for event in answer(load(kind), temperature) for t in event.token_ids]
    assert len(drawn) == 60 and set(drawn) <= set(PRESENT)


@pytest.mark.parametrize("kind", KINDS)
def test_head_without_a_tokenizer_draws_its_padding(load: Any, kind: str) -> None:
    drawn = [t for event in answer(load(kind, EVERY_ROW), 1.0) for t in event.token_ids]
    assert len(set(drawn) - set(PRESENT)) > 5, "the rows would not be noticed"


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_all_rows_cut(load: Any, kind: str) -> None:
    rows, every = [[5, 9, 200], [7], [1, 2]], [range(3), range(1), range(2)]
    whole = load(kind, EVERY_ROW).forward(0, rows, [0] * 3, every)
    backend = load(kind)
    cut = backend.forward(0, rows, [0] * 3, every)
    assert cut.shape == (6, backend.info.vocab_size) == (6, NUM_TOKENS)
    torch.testing.assert_close(cut[:, PRESENT], whole[:, PRESENT], rtol=0, atol=1e-4)
    assert cut[:, list(MISSING)].eq(ABSENT_LOGIT).all()


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_normalised_over_real_tokens(load: Any, kind: str) -> None:
    whole = load(kind, EVERY_ROW).forward(0, [list(PROMPT)], [0])
    expected = F.log_softmax(whole[0, PRESENT].double(), -1)
    (event, *_) = answer(load(kind), 1.0)
    index = PRESENT.index(event.token_ids[0])
    assert event.logprobs[0] == pytest.approx(float(expected[index]), abs=1e-4)


@pytest.mark.parametrize("in_one_pass", [True, False])
def test_scores_and_their_logits_are_of_real_tokens(load: Any, in_one_pass: bool) -> None:
    engine = Engine(load("onnx"), eos_token_ids=frozenset(), scores_in_one_pass=in_one_pass)
    future = engine.score(ScoringRequest("s", PROMPT, ((3, 4, 5),), with_logits=True))
    for _ in OfflineEngine(engine).run():
        pass
    (scored,) = future.result()
    assert scored.logits is not None and scored.logits.shape == (3, NUM_TOKENS)
    expected = F.log_softmax(torch.from_numpy(scored.logits[:, PRESENT]).double(), -1)
    np.testing.assert_allclose(scored.logprobs, expected[range(3), [3, 4, 5]], atol=1e-6)


def test_ids_without_a_token_add_nothing_to_a_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = (3 * torch.randn(4, NUM_ROWS, generator=generator) for _ in range(2))
    expected = exact_kl(policy[:, PRESENT].numpy(), reference[:, PRESENT].numpy())
    actual = exact_kl(REAL.cut(policy).numpy(), REAL.cut(reference).numpy())
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_heads_of_qwen2_5_are_cut_to_the_tokens_of_their_tokenizer() -> None:
    heads = [torch.zeros(2, num_rows) for num_rows in (152_064, 151_936)]
    tokens = RealTokens(151_665)
    assert [tokens.cut(logits).shape for logits in heads] == [(2, 151_665)] * 2
    assert [tokens.within(logits.shape[1]) for logits in heads] == [tokens] * 2


def test_head_with_fewer_rows_than_tokens_has_the_first_of_them() -> None:
    assert REAL.within(100) == RealTokens(100, (77,))
