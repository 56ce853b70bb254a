"""Does the ONNX graph compute what the torch model computes? Its own gate, in its own process.

optimum's validator logs a warning and returns success when its tolerance fails, so we measure
ourselves: teacher-forced, over prefill and 16 cached decode steps, at shapes that were never
traced. `python -m export.graph.parity STUDENT_DIR VARIANT_DIR` prints the report as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from estimators.divergence import exact_kl

PARITY_NAME = "parity.json"
BATCH_SIZES = (1, 2, 5)
PROMPT_LENGTHS = (1, 2, 33)
PAST_LENGTHS = (1, 40)
NUM_DECODE_STEPS = 16


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Worst case over all shapes: mean KL in nats per token, and the largest logit difference."""

    max_mean_kl: float
    max_logit_difference: float
    num_positions: int


def measure_in_fresh_process(student_dir: Path, variant_dir: Path) -> ParityReport:
    """Measure in a new interpreter: nothing that export patched can flatter the result."""
    command = [sys.executable, "-m", "export.graph.parity", str(student_dir), str(variant_dir)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the parity measurement failed:\n{done.stderr}")
    return ParityReport(**json.loads(done.stdout))


def measure(student_dir: Path, variant_dir: Path) -> ParityReport:
    """Compare plain transformers in float32 with the graph, shape by shape, over real tokens."""
    from serve.models.onnx_backend import OnnxBackend
    from serve.models.pretrained import load_pretrained
    from serve.text.tokenizer import Tokenizer

    student = load_pretrained(student_dir, torch.float32)
    real_tokens = Tokenizer.load(student_dir).real_tokens
    backend = OnnxBackend.load(
        variant_dir,
        device="cpu",
        max_num_seqs=max(BATCH_SIZES),
        max_model_len=128,
        real_tokens=real_tokens,
    )
    kls, differences = [], []
    for all_rows, actual in _cases(student, backend):
        expected = real_tokens.cut(torch.from_numpy(all_rows)).numpy()
        kls.append(exact_kl(expected, actual))
        differences.append(float(np.abs(expected - actual).max()))
    return ParityReport(
        max_mean_kl=max(float(kl.mean()) for kl in kls),
        max_logit_difference=max(differences),
        num_positions=sum(kl.size for kl in kls),
    )


def _cases(student: Any, backend: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield logits `(N, rows)` of torch and `(N, tokens)` of ONNX: each prefill shape, each decode
    behind each past."""
    rng = np.random.default_rng(0)
    vocab_size = backend.info.vocab_size
    for batch in BATCH_SIZES:
        for length in PROMPT_LENGTHS:
            rows = rng.integers(0, vocab_size, (batch, length)).tolist()
            yield _torch_logits(student, rows, 0), _prefill(backend, rows)
        for past in PAST_LENGTHS:
            rows = rng.integers(0, vocab_size, (batch, past + NUM_DECODE_STEPS)).tolist()
            yield _torch_logits(student, rows, past), _decode(backend, rows, past)


@torch.inference_mode()
def _torch_logits(student: Any, rows: list[list[int]], first: int) -> np.ndarray:
    logits: np.ndarray = student(torch.tensor(rows)).logits[:, first:].flatten(0, 1).numpy()
    return logits


def _prefill(backend: Any, rows: list[list[int]]) -> np.ndarray:
    wanted = [range(len(row)) for row in rows]
    logits: np.ndarray = backend.forward(0, rows, [0] * len(rows), wanted).numpy().copy()
    return logits


def _decode(backend: Any, rows: list[list[int]], past: int) -> np.ndarray:
    """Prefill `past` tokens, then feed the rest one by one; rows in `_torch_logits`'s order."""
    backend.forward(0, [row[:past] for row in rows], [0] * len(rows))
    steps = [
        backend.forward(0, [[row[t]] for row in rows], [t] * len(rows)).numpy().copy()
        for t in range(past, len(rows[0]))
    ]
    return np.stack(steps, axis=1).reshape(-1, steps[0].shape[-1])


if __name__ == "__main__":
    print(json.dumps(asdict(measure(Path(sys.argv[1]), Path(sys.argv[2])))))
