"""How fast decode and prefill are beside transformers, and two models beside each other."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from bench.gpu_check.machine import Bench, Result, count_parameters
from bundle.model_config import read_model_config
from serve.engine.engine import Engine
from serve.engine.offline import OfflineEngine
from serve.engine.sequence import Event, GenerationRequest, TokenEvent
from serve.engine.stats import EngineObserver
from serve.models.backend import Backend
from serve.models.onnx_backend import OnnxBackend
from serve.sampling.params import SamplingParams

MIN_SAMPLES_FOR_P99 = 200


def copy_bandwidth(bench: Bench) -> Result:
    """Copy a large tensor on the device; bytes read and written count."""
    source = torch.ones(bench.sizes.copy_bytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = min(bench.time_s(lambda: target.copy_(source)) for _ in range(10))
    return {"copied_bytes": source.nbytes, "gb_per_s": 2 * source.nbytes / seconds / 1e9}


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
    for _ in OfflineEngine(engine).run():
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
    return itemsize * (count_parameters(bench.student) - embeddings + num_cached) + 4 * head


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
    for _ in OfflineEngine(engine).run():
        pass
    return [later - earlier for earlier, later in itertools.pairwise(arrivals_s)]


def _latency(seconds: list[float]) -> Result:
    has_tail = len(seconds) >= MIN_SAMPLES_FOR_P99
    return {
        "num_intervals": len(seconds),
        "p50_ms": statistics.median(seconds) * 1e3,
        "p99_ms": float(np.percentile(seconds, 99)) * 1e3 if has_tail else None,
    }
