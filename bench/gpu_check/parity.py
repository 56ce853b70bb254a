"""Whether a device computes what the CPU does in float32, and CUDA graphs what steps without do."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from bench.gpu_check.machine import Bench, CheckFailedError, Result, freed
from estimators.divergence import exact_kl
from serve.models.backend import Backend

# Largest mean KL to the CPU's float32 logits, in nats per token.
MAX_MEAN_KL = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 2e-2}


def parity(bench: Bench, runtime: str, dtype: str) -> Result:
    """Compare logits with those of the CPU in float32, and count equal greedy tokens."""
    backend = bench.backend(runtime, dtype)
    prompts, expected, expected_tokens = _reference(bench)
    found, tokens = _forced_logits(backend, prompts), greedy(backend, prompts, 16)
    kl = exact_kl(expected, found)
    measured = {
        "mean_kl_nats": float(kl.mean()),
        "max_kl_nats": float(kl.max()),
        "max_logit_difference": float(np.abs(expected - found).max()),
        "same_argmax": float((expected.argmax(-1) == found.argmax(-1)).mean()),
        "num_same_greedy_tokens": _num_same(expected_tokens, tokens),
    }
    return check_divergence(measured, MAX_MEAN_KL[dtype])


@lru_cache(maxsize=1)
def _reference(bench: Bench) -> tuple[list[list[int]], np.ndarray, list[list[int]]]:
    """Return prompts, and the logits and greedy tokens of torch in float32 on the CPU."""
    prompts = bench.tokens(min(4, bench.sizes.max_num_seqs), 40)
    backend = bench.torch("float32", device="cpu")
    return prompts, _forced_logits(backend, prompts), greedy(backend, prompts, 16)


def check_divergence(measured: Result, max_mean_kl: float) -> Result:
    """Return `measured`. Raises CheckFailedError unless its mean KL is within the limit."""
    if not measured["mean_kl_nats"] <= max_mean_kl:
        raise CheckFailedError(f"more than {max_mean_kl} nats from float32", measured)
    return measured


@torch.inference_mode()
def _forced_logits(backend: Backend, rows: list[list[int]]) -> np.ndarray:
    """Return logits `(N, V)`: of the first half by one pass, of the rest one by one."""
    middle = len(rows[0]) // 2
    heads = [row[:middle] for row in rows]
    logits = [backend.forward(0, heads, [0] * len(rows), [range(middle)] * len(rows)).cpu().clone()]
    for position in range(middle, len(rows[0])):
        step = backend.forward(0, [[row[position]] for row in rows], [position] * len(rows))
        logits.append(step.cpu().clone())
    return torch.cat(logits).numpy()


@torch.inference_mode()
def greedy(backend: Backend, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Return each prompt's likeliest continuation, `(B, num_tokens)`."""
    rows = [prompt[:] for prompt in prompts]
    tokens = backend.forward(0, rows, [0] * len(rows)).argmax(-1).tolist()
    for _ in range(num_tokens - 1):
        pasts = [len(row) for row in rows]
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        tokens = backend.forward(0, [[token] for token in tokens], pasts).argmax(-1).tolist()
    return [
        [*row[len(prompt) :], token]
        for row, prompt, token in zip(rows, prompts, tokens, strict=True)
    ]


def _num_same(expected: list[list[int]], found: list[list[int]]) -> list[int]:
    """Return per row how many tokens are the same before the first that is not."""
    pairs = [list(zip(a, b, strict=True)) for a, b in zip(expected, found, strict=True)]
    return [next((i for i, (a, b) in enumerate(row) if a != b), len(row)) for row in pairs]


def cuda_graphs_onnx(bench: Bench) -> Result:
    """Run the same steps before and after capture: the same tokens, in less time."""
    bench.need_cuda()
    backend = bench.onnx(bench.sizes.dtype)
    off = _measure_graphs(bench, backend)
    backend.prepare()
    return compare_graphs(off, _measure_graphs(bench, backend))


def cuda_graphs_torch(bench: Bench) -> Result:
    """Run the same steps without and with graphs: the same tokens, in less time."""
    bench.need_cuda()
    measured = []
    for graphs in (False, True):
        with freed(bench):
            measured.append(_measure_graphs(bench, bench.torch(bench.sizes.dtype, graphs=graphs)))
    return compare_graphs(*measured)


def _measure_graphs(bench: Bench, backend: Backend) -> dict[int, tuple[list[list[int]], float]]:
    """Return by batch size the greedy tokens and the shortest step in seconds."""
    measured = {}
    for batch in bench.sizes.batch_sizes:
        tokens = greedy(backend, bench.tokens(batch, 32), bench.sizes.num_new_tokens)

        def step(batch: int = batch) -> None:
            backend.forward(0, [[5]] * batch, [64] * batch)

        measured[batch] = tokens, min(bench.time_s(step) for _ in range(30))
    return measured


def compare_graphs(
    off: dict[int, tuple[list[list[int]], float]], on: dict[int, tuple[list[list[int]], float]]
) -> Result:
    """Return step times by batch size. Raises CheckFailedError when graphs change a token."""
    changed = [batch for batch in off if off[batch][0] != on[batch][0]]
    if changed:
        raise CheckFailedError(f"graphs change the greedy tokens at batch sizes {changed}")
    return {
        str(batch): {
            "off_ms": off[batch][1] * 1e3,
            "on_ms": on[batch][1] * 1e3,
            "ratio": off[batch][1] / on[batch][1],
        }
        for batch in off
    }
