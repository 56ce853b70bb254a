"""How far a model is from itself: what its log-probabilities owe to the way they are computed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from serve.models.backend import Backend
from serve.sampling.sampler import token_logprobs

# Beyond it a teacher-forced pass is not what decoding would have given, and k3 no estimate.
MAX_PATH_NOISE_NATS = 1e-3
_NUM_TOKENS = 24


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """How far a model is from itself, in nats: the largest difference of one log-probability.

    `path_nats` between one pass and decoding, `batch_nats` between decoding alone and among other
    sequences. A divergence of that size says nothing about another model.
    """

    path_nats: float
    batch_nats: float


def measure_noise_floor(backend: Backend) -> NoiseFloor:
    """Score a pseudo-random text in one pass, by decoding, and by decoding in a batch.

    0 means bit for bit the same, NaN that the model's logits are not finite. It runs the backend
    for the first time, so it warms it up, too.
    """
    num_tokens = min(_NUM_TOKENS, backend.info.max_model_len)
    rng = np.random.default_rng(0)
    text = [int(t) for t in rng.integers(0, backend.info.vocab_size, num_tokens)]
    half = num_tokens // 2
    one_pass = backend.forward(0, [text[:-1]], [0], [range(half - 1, num_tokens - 1)]).clone()
    alone = _decode(backend, text, half, num_rows=1)
    batched = _decode(backend, text, half, num_rows=min(4, backend.info.max_num_seqs))
    predicted = torch.tensor(text[half:], device=one_pass.device)
    expected, *others = (token_logprobs(x, predicted, 1.0) for x in (alone, one_pass, batched))
    path_nats, batch_nats = (float((other - expected).abs().max()) for other in others)
    return NoiseFloor(path_nats, batch_nats)


def _decode(backend: Backend, text: list[int], half: int, num_rows: int) -> torch.Tensor:
    """Return the logits, `(len(text) - half, V)`, of row 0 fed with `text` token by token.

    The other rows hold the text up to other lengths.
    """
    texts = [text[row % half :] + text[: row % half] for row in range(num_rows)]
    halves = [max(half - row, 1) for row in range(num_rows)]
    prompts = [ids[:length] for ids, length in zip(texts, halves, strict=True)]
    steps = [backend.forward(0, prompts, [0] * num_rows)[:1].clone()]
    for fed in range(len(text) - half - 1):
        past = [length + fed for length in halves]
        newest = [[ids[at]] for ids, at in zip(texts, past, strict=True)]
        steps.append(backend.forward(0, newest, past)[:1].clone())
    return torch.cat(steps)
