"""Models, prompts and sizes of a benchmark, and an engine that is driven and listened to."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from bench.engine.graph import lengthen
from bench.prompts import PromptSource
from bundle.model_config import read_model_config
from serve.engine.engine import Engine
from serve.engine.offline import OfflineEngine
from serve.engine.scoring import ScoredCompletion, ScoringRequest
from serve.engine.sequence import Event, FinishedEvent, FinishReason, GenerationRequest
from serve.engine.stats import EngineObserver
from serve.models.backend import Backend
from serve.sampling.params import SamplingParams

MAX_NUM_SEQS = 16


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured. Pairs are least and most of lengths that are drawn at random."""

    num_rounds: int = 5
    prompt_tokens: int = 64
    new_tokens: int = 64
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    host_batches: tuple[int, ...] = (1, 8, 16)
    prefill_tokens: tuple[int, ...] = (64, 512, 2048)
    num_samples: int = 8
    repeated_prompt_tokens: int = 512
    long_prompt_tokens: int = 4096
    long_model_len: int = 4608
    short_tokens: int = 192
    wire_batches: tuple[int, ...] = (1, 8, 16)
    wire_tokens: int = 128
    shadow_streams: tuple[int, ...] = (1, 4)
    shadow_requests: int = 6
    num_mixed: int = 64
    mixed_prompt_tokens: tuple[int, int] = (8, 1024)
    mixed_new_tokens: tuple[int, int] = (1, 128)
    num_soak: int = 1000
    soak_wave: int = 32
    soak_interval: int = 50
    soak_prompt_tokens: tuple[int, int] = (8, 256)
    soak_new_tokens: tuple[int, int] = (1, 64)

    @property
    def max_model_len(self) -> int:
        """What the models of all checks but `long_context` are loaded with."""
        lengths = (
            *self.prefill_tokens,
            self.prompt_tokens + max(self.new_tokens, self.wire_tokens),
            self.repeated_prompt_tokens + 2,
            self.mixed_prompt_tokens[1] + self.mixed_new_tokens[1],
            self.soak_prompt_tokens[1] + self.soak_new_tokens[1],
        )
        return max(lengths)


QUICK = Scale(
    num_rounds=1,
    prompt_tokens=16,
    new_tokens=8,
    batches=(1, 4),
    host_batches=(1, 16),
    prefill_tokens=(16, 64),
    num_samples=4,
    repeated_prompt_tokens=64,
    long_prompt_tokens=768,
    long_model_len=4096,
    short_tokens=32,
    wire_batches=(1, 4),
    wire_tokens=16,
    shadow_streams=(1, 2),
    shadow_requests=2,
    num_mixed=24,
    mixed_prompt_tokens=(4, 300),
    mixed_new_tokens=(1, 16),
    num_soak=96,
    soak_wave=16,
    soak_interval=8,
    soak_prompt_tokens=(4, 64),
    soak_new_tokens=(1, 8),
)


class Models(Protocol):
    """Loads what the checks ask for; the same question has the same answer."""

    def student(self, max_num_seqs: int, max_model_len: int) -> Backend: ...

    def teacher(self, max_num_seqs: int, max_model_len: int) -> Backend: ...


class Prompts:
    """Real text as token ids, every time another piece of it."""

    def __init__(self, source: PromptSource) -> None:
        self._source = source
        self._num_drawn = 0

    def draw(self, num_prompts: int, num_tokens: int) -> list[list[int]]:
        first, self._num_drawn = self._num_drawn, self._num_drawn + num_prompts
        return self._source.draw(first, num_prompts, num_tokens)


@dataclass(frozen=True, slots=True)
class CheckSetting:
    """What a check in process works with. `num_threads` are torch's for a torch model."""

    models: Models
    prompts: Prompts
    scale: Scale
    num_threads: int
    seed: int = 0

    def student(self, max_num_seqs: int = MAX_NUM_SEQS, max_model_len: int | None = None) -> Driver:
        length = max_model_len or self.scale.max_model_len
        return self._driver(self.models.student(max_num_seqs, length))

    def teacher(self) -> Driver:
        return self._driver(self.models.teacher(MAX_NUM_SEQS, self.scale.max_model_len))

    def _driver(self, backend: Backend) -> Driver:
        # As `serve.app.loading` does: torch only samples for a model that runs in onnxruntime.
        return Driver(backend, 1 if backend.info.backend == "onnx" else self.num_threads)


@dataclass(frozen=True, slots=True)
class EngineStep:
    """One step of an engine; it ended at `ended_s`, and `host_s` of `step_s` was not the model."""

    phase: str
    batch_size: int
    step_s: float
    host_s: float
    ended_s: float

    @property
    def model_s(self) -> float:
        return self.step_s - self.host_s


class StepLog(EngineObserver):
    """Keeps the steps since the last `clear`."""

    def __init__(self) -> None:
        self.steps: list[EngineStep] = []

    def on_step(self, phase: str, batch_size: int, step_s: float, host_s: float) -> None:
        self.steps.append(EngineStep(phase, batch_size, step_s, host_s, time.perf_counter()))

    def clear(self) -> None:
        self.steps.clear()

    def decodes(self, batch_size: int) -> list[EngineStep]:
        """Return the decode steps of exactly so many sequences."""
        return [s for s in self.steps if (s.phase, s.batch_size) == ("decode", batch_size)]

    def decode_pairs(self, batch_size: int) -> list[tuple[EngineStep, EngineStep]]:
        """Return such steps that followed each other with nothing in between."""
        wanted = ("decode", batch_size)
        return [
            (before, after)
            for before, after in itertools.pairwise(self.steps)
            if (before.phase, before.batch_size) == (after.phase, after.batch_size) == wanted
        ]


class Reader:
    """An event sink: when tokens of each sample came, and how the samples ended."""

    def __init__(self) -> None:
        self.submitted_s = time.perf_counter()
        self.token_times_s: defaultdict[int, list[float]] = defaultdict(list)
        self.endings: list[FinishedEvent] = []

    def __call__(self, events: list[Event]) -> None:
        now_s = time.perf_counter()
        for event in events:
            if isinstance(event, FinishedEvent):
                self.endings.append(event)
            else:
                self.token_times_s[event.index].append(now_s)

    @property
    def ttft_s(self) -> float:
        """Seconds until every sample had its first token."""
        return max(times[0] for times in self.token_times_s.values()) - self.submitted_s

    @property
    def ended_s(self) -> float:
        return max(times[-1] for times in self.token_times_s.values())

    @property
    def completions(self) -> tuple[tuple[int, ...], ...]:
        """Token ids by sample; every sample must have run to its length."""
        endings = sorted(self.endings, key=lambda event: event.index)
        assert all(e.finish_reason is FinishReason.LENGTH for e in endings), endings
        return tuple(event.token_ids for event in endings)


def make_request(
    request_id: str, prompt: Sequence[int], cache_salt: str | None, sampling: SamplingParams
) -> GenerationRequest:
    return GenerationRequest(request_id, tuple(prompt), sampling, cache_salt=cache_salt)


class Driver:
    """An engine on the calling thread, with the log of its steps."""

    def __init__(self, backend: Backend, num_torch_threads: int) -> None:
        self.backend = backend
        self.log = StepLog()
        self._num_torch_threads = num_torch_threads
        self.engine = Engine(
            backend, eos_token_ids=frozenset(), observer=self.log, max_waiting=1 << 20
        )
        self._request_ids = itertools.count()

    def submit(
        self, prompt: Sequence[int], sampling: SamplingParams, cache_salt: str | None = None
    ) -> Reader:
        """Queue a prompt; without a salt the prefix cache is not used."""
        reader = Reader()
        request = make_request(str(next(self._request_ids)), prompt, cache_salt, sampling)
        self.engine.submit(request, reader)
        return reader

    @torch.no_grad()
    def work(self) -> Iterator[None]:
        """Step until nothing is left, yielding after each step."""
        torch.set_num_threads(self._num_torch_threads)
        yield from OfflineEngine(self.engine).run()

    def run(self) -> None:
        for _ in self.work():
            pass

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[Reader]:
        """Run all prompts together, with a log of these steps alone."""
        self.log.clear()
        readers = [self.submit(prompt, sampling) for prompt in prompts]
        self.run()
        return readers

    def score(
        self, prompt: Sequence[int], completions: tuple[tuple[int, ...], ...]
    ) -> list[ScoredCompletion]:
        """Score in one pass, without the prefix cache."""
        request_id = str(next(self._request_ids))
        request = ScoringRequest(request_id, tuple(prompt), completions, cache_salt=None)
        future = self.engine.score(request)
        self.run()
        return future.result(0)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def drawn(max_tokens: int, num_samples: int = 1, seed: int = 0) -> SamplingParams:
    """Temperature 1."""
    return SamplingParams(
        num_samples=num_samples, max_tokens=max_tokens, seed=seed, ignore_eos=True
    )


class BundleModels:
    """A bundle's student in onnxruntime and its teacher in torch, as `tandem serve` loads them.

    A context longer than the bundle's graph covers gets a copy of it with longer rotary tables.
    """

    def __init__(self, variant: Path, teacher: Path, device: str, num_threads: int) -> None:
        self._variant = variant
        self._teacher = teacher
        self._device = device
        self._num_threads = num_threads
        self._loaded: dict[tuple[str, int, int], Backend] = {}

    def student(self, max_num_seqs: int, max_model_len: int) -> Backend:
        key = ("student", max_num_seqs, max_model_len)
        if key not in self._loaded:
            config = read_model_config(self._variant)
            if max_model_len <= config.max_position_embeddings:
                self._loaded[key] = self._load_student(self._variant, max_num_seqs, max_model_len)
            else:
                with tempfile.TemporaryDirectory() as scratch:
                    longer = Path(scratch) / self._variant.name
                    lengthen(self._variant, longer, max_model_len)
                    self._loaded[key] = self._load_student(longer, max_num_seqs, max_model_len)
        return self._loaded[key]

    def teacher(self, max_num_seqs: int, max_model_len: int) -> Backend:
        key = ("teacher", max_num_seqs, max_model_len)
        if key not in self._loaded:
            from serve.models.torch_backend import TorchBackend

            torch.set_num_threads(self._num_threads)
            self._loaded[key] = TorchBackend.load(
                self._teacher,
                device=self._device,
                dtype=torch.bfloat16,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
            )
        return self._loaded[key]

    def _load_student(self, folder: Path, max_num_seqs: int, max_model_len: int) -> Backend:
        from serve.models.onnx_backend import OnnxBackend

        return OnnxBackend.load(
            folder,
            device=self._device,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            num_threads=self._num_threads,
        )
