"""Every check that needs a GPU, in one run: `python -m bench.gpu_check --random 1b --out FILE`.

Nothing is fetched: `--random` makes a Llama with random weights, `--bundle` takes a bundle's
student. The graphs are exported on the spot, in float16 and bfloat16. Each check returns what it
measured; one that fails leaves its error in the JSON, and the others go on.

Exit status: 0, 1 when a check failed, 3 without CUDA. `--device cpu` runs the checks that make
sense there, in tiny numbers, so that a test covers this file.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
import transformers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from bundle.model_config import read_model_config
from bundle.model_folder import open_model_folder
from estimators.divergence import exact_kl
from export.graph.half_precision import to_half
from export.graph.onnx_graph import export_onnx, save_onnx
from serve.engine.engine import Engine
from serve.engine.sequence import Event, GenerationRequest, TokenEvent
from serve.engine.stats import EngineObserver
from serve.models.backend import Backend
from serve.models.onnx_backend import OnnxBackend
from serve.models.onnx_session import make_session
from serve.models.pretrained import load_pretrained
from serve.models.torch_backend import TorchBackend
from serve.sampling.params import SamplingParams

logger = logging.getLogger(__name__)

NO_CUDA = 3
# Largest mean KL to the CPU's float32 logits, in nats per token.
MAX_MEAN_KL = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 2e-2}
# What a runtime cannot run at all.
NO_KERNELS = {
    "cpu": {("onnx", "bfloat16"), ("torch", "float16")},
    "cuda": {("onnx", "float32")},
}
MIN_SAMPLES_FOR_P99 = 200
# hidden, intermediate, layers, heads, KV heads, vocabulary, positions; SmolLM2-135M, Llama-3.2-1B.
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 320, 64),
    "small": (576, 1536, 30, 9, 3, 49152, 4096),
    "1b": (2048, 8192, 16, 32, 8, 128256, 4096),
}

Result = dict[str, Any]
Check = Callable[["Bench"], Result]


class CheckFailedError(Exception):
    """What was measured, `found`, is not what must be."""

    def __init__(self, problem: str, found: Result | None = None) -> None:
        super().__init__(problem)
        self.found = found or {}


class CheckSkippedError(Exception):
    """The check makes no sense on this device; the text says why."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. `dtype` is the one that speed is measured in."""

    dtype: str
    batch_sizes: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    num_new_tokens: int
    num_rounds: int
    num_itl_tokens: int
    copy_bytes: int
    max_model_len: int

    @property
    def max_num_seqs(self) -> int:
        return max(self.batch_sizes)


FULL = Sizes("bfloat16", (1, 8, 16, 32, 64), (512, 2048), 64, 3, 512, 2 << 30, 2304)
TINY = Sizes("float32", (1, 2), (16,), 4, 2, 8, 1 << 20, 64)


@dataclass(frozen=True, slots=True)
class Bench:
    """Transformers folders of both models, the student's graphs by dtype, and how much to do."""

    student: Path
    teacher: Path
    graphs: Path
    device: torch.device
    sizes: Sizes

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def onnx(self, dtype: str, *, priority: int = 0) -> OnnxBackend:
        """Load the student's graph; on CUDA, on a stream of its own (priority -1: urgent)."""
        stream = torch.cuda.Stream(self.device, priority=priority) if self.on_cuda else None
        return OnnxBackend.load(
            self.graphs / dtype,
            device=str(self.device),
            max_num_seqs=self.sizes.max_num_seqs,
            max_model_len=self.sizes.max_model_len,
            stream=stream.cuda_stream if stream else None,
        )

    def torch(
        self, dtype: str, *, graphs: bool = True, folder: Path | None = None, device: str = ""
    ) -> TorchBackend:
        return TorchBackend.load(
            folder or self.student,
            device=device or str(self.device),
            dtype=getattr(torch, dtype),
            max_num_seqs=self.sizes.max_num_seqs,
            max_model_len=self.sizes.max_model_len,
            enable_cuda_graphs=graphs,
        )

    def backend(self, runtime: str, dtype: str) -> Backend:
        """Load the student in a runtime. Raises like `need_kernels`."""
        self.need_kernels(runtime, dtype)
        return self.onnx(dtype) if runtime == "onnx" else self.torch(dtype)

    def need_kernels(self, runtime: str, dtype: str) -> None:
        """Raise CheckSkippedError when `runtime` cannot run `dtype` on the device."""
        if (runtime, dtype) in NO_KERNELS[self.device.type]:
            raise CheckSkippedError(f"{runtime} has no {dtype} kernels on {self.device.type}")

    def need_cuda(self) -> None:
        """Raise CheckSkippedError on the CPU."""
        if not self.on_cuda:
            raise CheckSkippedError("needs CUDA")

    def transformers(self) -> Any:
        model = load_pretrained(self.student, getattr(torch, self.sizes.dtype))
        model.generation_config.eos_token_id = None
        return model.to(self.device)

    def tokens(self, num_rows: int, length: int) -> list[list[int]]:
        vocab_size = read_model_config(self.student).vocab_size
        ids = np.random.default_rng(0).integers(3, vocab_size, (num_rows, length))
        return [[int(token_id) for token_id in row] for row in ids]

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def time_s(self, work: Callable[[], object]) -> float:
        """Return how long `work` takes, to the end of what it queued on the device."""
        self.synchronize()
        started_s = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - started_s


# -- what the machine is --------------------------------------------------------------------------


def environment(bench: Bench) -> Result:
    """Name the device and the versions of what runs on it."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(bench.device) if bench.on_cuda else platform.machine(),
        "driver": _driver_version() if bench.on_cuda else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": ort.__version__,
        "transformers": transformers.__version__,
        "sizes": asdict(bench.sizes),
        "num_parameters": _num_parameters(bench.student),
    }


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.split()[0]


def copy_bandwidth(bench: Bench) -> Result:
    """Copy a large tensor on the device; bytes read and written count."""
    source = torch.ones(bench.sizes.copy_bytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = min(bench.time_s(lambda: target.copy_(source)) for _ in range(10))
    return {"copied_bytes": source.nbytes, "gb_per_s": 2 * source.nbytes / seconds / 1e9}


# -- where it runs --------------------------------------------------------------------------------


def placement(bench: Bench, dtype: str) -> Result:
    """Profile a prefill and two decode steps: every node on the device, no copies between."""
    bench.need_kernels("onnx", dtype)
    provider = "CUDAExecutionProvider" if bench.on_cuda else "CPUExecutionProvider"
    return check_placement(profile_nodes(bench, dtype), provider)


def check_placement(nodes: Counter[tuple[str, str]], provider: str) -> Result:
    """Return how many nodes ran. Raises CheckFailedError for copies, and for other providers."""
    elsewhere = {f"{p} {op}": n for (p, op), n in nodes.items() if p != provider}
    num_memcpy = sum(n for (_, op), n in nodes.items() if op.startswith("Memcpy"))
    found = {
        "num_nodes_run": sum(nodes.values()),
        "num_memcpy": num_memcpy,
        "elsewhere": elsewhere,
    }
    if elsewhere or num_memcpy or not nodes:
        raise CheckFailedError(f"not every node runs on {provider}, without copies", found)
    return found


def profile_nodes(bench: Bench, dtype: str) -> Counter[tuple[str, str]]:
    """Return how often nodes ran, by provider and operator, in one prefill and two decode steps."""
    folder = bench.graphs / dtype
    stream = torch.cuda.Stream(bench.device) if bench.on_cuda else None
    with tempfile.TemporaryDirectory() as scratch:
        session = make_session(
            folder / "model.onnx",
            str(bench.device),
            None,
            stream=stream.cuda_stream if stream else 0,
            profile_prefix=Path(scratch) / "profile",
        )
        backend = OnnxBackend(
            session,
            read_model_config(folder).settings,
            device=bench.device,
            precision=dtype,
            num_parameters=0,
            stream=stream,
            max_num_seqs=bench.sizes.max_num_seqs,
            max_model_len=bench.sizes.max_model_len,
        )
        _greedy(backend, bench.tokens(1, 8), 3)
        return count_nodes(json.loads(Path(session.end_profiling()).read_text()))


def count_nodes(events: Sequence[Result]) -> Counter[tuple[str, str]]:
    """Count an onnxruntime profile's nodes by provider and operator.

    >>> kernel = {"cat": "Node", "args": {"provider": "CUDAExecutionProvider", "op_name": "Add"}}
    >>> count_nodes([kernel, kernel, {"cat": "Session", "args": {}}])
    Counter({('CUDAExecutionProvider', 'Add'): 2})
    """
    nodes = [e["args"] for e in events if e.get("cat") == "Node" and "provider" in e["args"]]
    return Counter((args["provider"], args["op_name"]) for args in nodes)


def float32_is_refused(bench: Bench) -> Result:
    """A graph without CUDA kernels must be refused, not run on the CPU."""
    bench.need_cuda()
    return refusal(partial(bench.onnx, "float32"))


def refusal(load: Callable[[], object]) -> Result:
    """Return why `load` refuses. Raises CheckFailedError when it does not."""
    try:
        load()
    except ValueError as error:
        return {"error": str(error)}
    raise CheckFailedError("a graph without CUDA kernels was loaded")


# -- whether it is right --------------------------------------------------------------------------


def parity(bench: Bench, runtime: str, dtype: str) -> Result:
    """Compare logits with those of the CPU in float32, and count equal greedy tokens."""
    backend = bench.backend(runtime, dtype)
    prompts, expected, expected_tokens = _reference(bench)
    found, tokens = _forced_logits(backend, prompts), _greedy(backend, prompts, 16)
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
    return prompts, _forced_logits(backend, prompts), _greedy(backend, prompts, 16)


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
def _greedy(backend: Backend, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
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
        with _freed(bench):
            measured.append(_measure_graphs(bench, bench.torch(bench.sizes.dtype, graphs=graphs)))
    return compare_graphs(*measured)


def _measure_graphs(bench: Bench, backend: Backend) -> dict[int, tuple[list[list[int]], float]]:
    """Return by batch size the greedy tokens and the shortest step in seconds."""
    measured = {}
    for batch in bench.sizes.batch_sizes:
        tokens = _greedy(backend, bench.tokens(batch, 32), bench.sizes.num_new_tokens)

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


# -- how fast it is -------------------------------------------------------------------------------


class _StepTimes(EngineObserver):
    """Keeps how long each decode step took, by batch size."""

    def __init__(self) -> None:
        self.decode_s: dict[int, list[float]] = {}

    def on_step(self, phase: str, batch_size: int, step_s: float, host_s: float) -> None:
        if phase == "decode":
            self.decode_s.setdefault(batch_size, []).append(step_s)


def decode(bench: Bench, runtime: str) -> Result:
    """Decode through the engine and through transformers `generate`, round by round."""
    sizes, backend = bench.sizes, bench.backend(runtime, bench.sizes.dtype)
    if isinstance(backend, OnnxBackend):
        backend.prepare()
    model, gb_per_s = bench.transformers(), copy_bandwidth(bench)["gb_per_s"]
    result: Result = {}
    for batch in sizes.batch_sizes:
        sides: dict[str, Callable[[], float]] = {
            runtime: partial(_engine_step_s, bench, backend, batch),
            "transformers": partial(_generate_step_s, bench, model, batch, None),
        }
        steps_s = _interleave(sides, bench)
        num_bytes = _step_bytes(bench, batch)
        result[str(batch)] = _compare_speed(steps_s, batch) | {
            "share_of_copy_bandwidth": {
                side: num_bytes / statistics.median(seconds) / 1e9 / gb_per_s
                for side, seconds in steps_s.items()
            }
        }
    return result


def decode_static_transformers(bench: Bench) -> Result:
    """Decode with transformers' static cache, which it compiles: its fastest way."""
    bench.need_cuda()
    model, result = bench.transformers(), {}
    for batch in bench.sizes.batch_sizes:
        _generate_step_s(bench, model, batch, "static")  # compiles
        seconds = [_generate_step_s(bench, model, batch, "static") for _ in range(3)]
        result[str(batch)] = _speed(seconds, batch)
    return result


def prefill(bench: Bench, runtime: str) -> Result:
    """Run one whole prompt, round by round, on a backend and on transformers."""
    backend, model = bench.backend(runtime, bench.sizes.dtype), bench.transformers()
    result: Result = {}
    for length in bench.sizes.prompt_lengths:
        (prompt,) = bench.tokens(1, length)
        ids = torch.tensor([prompt], device=bench.device)
        sides: dict[str, Callable[[], float]] = {
            runtime: partial(bench.time_s, partial(backend.forward, 0, [prompt], [0])),
            "transformers": partial(bench.time_s, partial(_prefill, model, ids)),
        }
        result[str(length)] = _compare_speed(_interleave(sides, bench), length)
    return result


@torch.inference_mode()
def _prefill(model: Any, ids: torch.Tensor) -> None:
    model(ids, use_cache=True, logits_to_keep=1)


def _interleave(sides: dict[str, Callable[[], float]], bench: Bench) -> dict[str, list[float]]:
    """Return the seconds of every side by round, after one round that does not count."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(bench.sizes.num_rounds + 1):
        for side, measure in sides.items():
            measured_s = measure()
            if number > 0:
                seconds[side].append(measured_s)
    return seconds


def _engine_step_s(bench: Bench, backend: Backend, batch: int) -> float:
    """Return the median decode step of a full batch through the engine, in seconds."""
    times = _StepTimes()
    engine = Engine(backend, eos_token_ids=frozenset(), observer=times)
    sampling = SamplingParams(temperature=0.0, max_tokens=bench.sizes.num_new_tokens)
    for index, prompt in enumerate(bench.tokens(batch, 32)):
        request = GenerationRequest(str(index), tuple(prompt), sampling, cache_salt=None)
        engine.submit(request, lambda events: None)
    for _ in engine.run():
        pass
    return statistics.median(times.decode_s[batch])


class _StepClock(StoppingCriteria):  # type: ignore[misc, unused-ignore]
    """Notes when `generate` has each of its tokens, and stops nothing."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times_s.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _generate_step_s(bench: Bench, model: Any, batch: int, cache: str | None) -> float:
    """Return the median decode step of `generate` in seconds; it waits for the device each step."""
    ids = torch.tensor(bench.tokens(batch, 32), device=bench.device)
    clock = _StepClock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=bench.sizes.num_new_tokens,
        do_sample=False,
        pad_token_id=0,
        cache_implementation=cache,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return statistics.median(later - now for now, later in itertools.pairwise(clock.times_s))


def _speed(seconds: list[float], num_tokens: int) -> Result:
    median_s = statistics.median(seconds)
    return {
        "ms": {"median": median_s * 1e3, "min": min(seconds) * 1e3, "max": max(seconds) * 1e3},
        "tokens_per_s": num_tokens / median_s,
    }


def _compare_speed(seconds: dict[str, list[float]], num_tokens: int) -> Result:
    """Return each side's speed, and how many times as fast as transformers the other one is."""
    ((_, own), (_, peer)) = seconds.items()
    speeds: Result = {side: _speed(each, num_tokens) for side, each in seconds.items()}
    return speeds | {"ratio": statistics.median(p / s for s, p in zip(own, peer, strict=True))}


def _step_bytes(bench: Bench, batch: int) -> int:
    """Return what a decode step must read: every weight once, the head in float32, and the cache.

    A tied embedding is the head; an untied one is looked up, not read.
    """
    config = read_model_config(bench.student)
    head = config.vocab_size * config.hidden_size
    embeddings = head if config.tie_word_embeddings else 2 * head
    past = 32 + bench.sizes.num_new_tokens // 2
    num_cached = (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * past * batch
    )
    itemsize: int = getattr(torch, bench.sizes.dtype).itemsize
    return itemsize * (_num_parameters(bench.student) - embeddings + num_cached) + 4 * head


def _num_parameters(folder: Path) -> int:
    return open_model_folder(folder, has_tokenizer=False).num_parameters


# -- two models at once ---------------------------------------------------------------------------


def side_by_side(bench: Bench) -> Result:
    """Measure the student's inter-token latency alone, and while the teacher generates."""
    student = bench.onnx(bench.sizes.dtype, priority=-1)
    teacher = bench.torch("bfloat16", folder=bench.teacher)
    is_warm, is_busy, is_over = threading.Event(), threading.Event(), threading.Event()
    bench.synchronize()

    def shadow() -> None:
        with torch.cuda.stream(torch.cuda.Stream(bench.device)) if bench.on_cuda else nullcontext():
            num_samples = bench.sizes.max_num_seqs // 2
            try:
                _token_times(bench, teacher, num_samples)  # captures its graphs
            finally:
                is_warm.set()
            is_busy.wait()
            while not is_over.is_set():
                _token_times(bench, teacher, num_samples)

    student.prepare()
    with ThreadPoolExecutor(1) as pool:
        shadowing = pool.submit(shadow)
        try:
            is_warm.wait()
            alone_s = _token_times(bench, student)
            is_busy.set()
            shadowed_s = _token_times(bench, student)
        finally:
            is_over.set()
            is_busy.set()
        shadowing.result()
    p50_ratio = statistics.median(shadowed_s) / statistics.median(alone_s)
    return {"alone": _latency(alone_s), "shadowed": _latency(shadowed_s), "p50_ratio": p50_ratio}


@torch.inference_mode()
def _token_times(bench: Bench, backend: Backend, num_samples: int = 1) -> list[float]:
    """Generate on this thread; return the seconds between one sample's tokens."""
    arrivals_s: list[float] = []

    def sink(events: list[Event]) -> None:
        now_s = time.perf_counter()
        arrivals_s.extend(now_s for e in events if isinstance(e, TokenEvent) and e.index == 0)

    num_tokens = min(bench.sizes.num_itl_tokens, bench.sizes.max_model_len - 16)
    params = SamplingParams(num_samples=num_samples, max_tokens=num_tokens, ignore_eos=True)
    engine = Engine(backend, eos_token_ids=frozenset())
    (prompt,) = bench.tokens(1, 16)
    engine.submit(GenerationRequest("r", tuple(prompt), params, cache_salt=None), sink)
    for _ in engine.run():
        pass
    return [later - earlier for earlier, later in itertools.pairwise(arrivals_s)]


def _latency(seconds: list[float]) -> Result:
    has_tail = len(seconds) >= MIN_SAMPLES_FOR_P99
    return {
        "num_intervals": len(seconds),
        "p50_ms": statistics.median(seconds) * 1e3,
        "p99_ms": float(np.percentile(seconds, 99)) * 1e3 if has_tail else None,
    }


# -- the run --------------------------------------------------------------------------------------

CHECKS: dict[str, Check] = {
    "environment": environment,
    "copy_bandwidth": copy_bandwidth,
    **{f"placement_{dtype}": partial(placement, dtype=dtype) for dtype in MAX_MEAN_KL},
    "float32_is_refused": float32_is_refused,
    **{
        f"parity_{runtime}_{dtype}": partial(parity, runtime=runtime, dtype=dtype)
        for runtime in ("torch", "onnx")
        for dtype in MAX_MEAN_KL
    },
    "cuda_graphs_onnx": cuda_graphs_onnx,
    "cuda_graphs_torch": cuda_graphs_torch,
    **{f"decode_{runtime}": partial(decode, runtime=runtime) for runtime in ("onnx", "torch")},
    **{f"prefill_{runtime}": partial(prefill, runtime=runtime) for runtime in ("onnx", "torch")},
    "side_by_side": side_by_side,
    "decode_static_transformers": decode_static_transformers,
}


def run_checks(bench: Bench, checks: dict[str, Check], out: Path | None = None) -> Result:
    """Run one check after the other; write what there is after each, if there is an `out`."""
    results: Result = {}
    for name, check in checks.items():
        started_s = time.perf_counter()
        with _freed(bench):
            results[name] = _run_check(check, bench)
        results[name]["seconds"] = time.perf_counter() - started_s
        logger.info("%s: %s", name, results[name])
        if out is not None:
            out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _run_check(check: Check, bench: Bench) -> Result:
    try:
        return {"status": "passed", **check(bench)}
    except CheckSkippedError as error:
        return {"status": f"skipped: {error}"}
    except CheckFailedError as error:
        return {"status": "failed", "error": str(error), **error.found}
    except Exception as error:
        # Whatever it is, it is this check's result, and a GPU's time is short.
        logger.exception("a check failed")
        return {"status": "failed", "error": f"{type(error).__name__}: {error}"}


@contextmanager
def _freed(bench: Bench) -> Iterator[None]:
    """Give the models of the block back to the device."""
    yield
    if bench.on_cuda:
        gc.collect()
        torch.cuda.empty_cache()


def make_random_model(shape: str, seed: int, folder: Path) -> Path:
    """Save a Llama with random weights.

    Products keep the size of what goes in: smaller weights make all tokens alike, larger ones make
    chaos of the last bits.
    """
    hidden, intermediate, layers, heads, kv_heads, vocab_size, positions = SHAPES[shape]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        initializer_range=1 / hidden**0.5,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # all ones, they would be one initializer and some Identity nodes
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def export_graphs(student: Path, target: Path) -> Path:
    """Write the student's graph in float32, float16 and bfloat16 under `target`."""
    for dtype in MAX_MEAN_KL:
        (target / dtype).mkdir(parents=True)
        (target / dtype / "config.json").write_text((student / "config.json").read_text())
    model = load_pretrained(student, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporters warn about themselves
        path = export_onnx(
            model, target / "float32", max_model_len=model.config.max_position_embeddings
        )
    save_onnx(to_half(onnx.load(path), "float16"), target / "float16")
    save_onnx(to_half(onnx.load(path), "bfloat16"), target / "bfloat16")
    return target


def make_bench(options: argparse.Namespace, scratch: Path) -> Bench:
    """Return what `options` ask for; what has to be made is made in `scratch`."""
    if options.bundle is None:
        student = make_random_model(options.random, 0, scratch / "student")
        teacher = make_random_model(options.random, 1, scratch / "teacher")
    else:
        student = options.bundle / "student"
        teacher = options.teacher or student
    device = torch.device(options.device)
    sizes = FULL if device.type == "cuda" else TINY
    return Bench(student, teacher, export_graphs(student, scratch / "onnx"), device, sizes)


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.gpu_check", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--bundle", type=Path, help="a bundle whose student/ is measured")
    source.add_argument("--random", choices=sorted(SHAPES), help="a Llama with random weights")
    parser.add_argument("--teacher", type=Path, help="the model beside the bundle's student")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--only", nargs="+", choices=sorted(CHECKS), help="these checks only")
    parser.add_argument("--out", type=Path, help="where the JSON goes as well")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse_options(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device; --device cpu tries the checks out", file=sys.stderr)
        return NO_CUDA
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    checks = {name: CHECKS[name] for name in CHECKS if name in (options.only or CHECKS)}
    with tempfile.TemporaryDirectory() as scratch:
        results = run_checks(make_bench(options, Path(scratch)), checks, options.out)
    print(json.dumps(results, indent=1))
    return int(any(result["status"] == "failed" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
