"""What serving costs on top of an engine: gRPC streaming, and shadowing by the teacher."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.engine.driver import MAX_NUM_SEQS, CheckSetting, Reader, drawn, make_request
from bench.engine.measures import Measures, Round, at_least, at_most
from bench.engine.server import Stream, Wire, mean_step_s, student_request
from serve.engine.engine import Engine
from serve.engine.sequence import Event
from tandem.demo import serving

GRPC_TARGET = at_least(0.92)
SHADOW_TARGET = at_most(1.3)


@dataclass(frozen=True, slots=True)
class ServerFlags:
    """What `tandem serve` is told about the models and the device."""

    bundle: Path
    student: tuple[str, ...]
    teacher: tuple[str, ...]

    def of(self, max_model_len: int, *, with_teacher: bool) -> list[str]:
        return [
            *self.student,
            *(self.teacher if with_teacher else ("--no-teacher",)),
            *("--max-num-seqs", str(MAX_NUM_SEQS), "--max-model-len", str(max_model_len)),
        ]


class EngineThread:
    """An engine on its own thread, as the server has it, with nothing between it and its caller."""

    def __init__(self, setting: CheckSetting) -> None:
        backend = setting.models.student(MAX_NUM_SEQS, setting.scale.max_model_len)
        self._engine = Engine(backend, eos_token_ids=frozenset(), num_torch_threads=1)
        self._engine.start()

    def stop(self) -> None:
        self._engine.stop()

    def tokens_per_s(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> float:
        """Run all prompts at once, with the server's settings: prefix cache on, temperature 1."""
        readers = [_Waiter() for _ in prompts]
        started_s = time.perf_counter()
        for number, (prompt, reader) in enumerate(zip(prompts, readers, strict=True)):
            sampling = drawn(max_tokens, seed=number)
            self._engine.submit(make_request(f"{number}", prompt, "", sampling), reader)
        for reader in readers:
            reader.has_ended.wait()
        seconds = time.perf_counter() - started_s
        return sum(len(reader.completions[0]) for reader in readers) / seconds


class _Waiter(Reader):
    def __init__(self) -> None:
        super().__init__()
        self.has_ended = threading.Event()

    def __call__(self, events: list[Event]) -> None:
        super().__call__(events)
        if self.endings:
            self.has_ended.set()


def grpc_streaming(setting: CheckSetting, flags: ServerFlags) -> Measures:
    """Tokens per second through gRPC, text included, over those of an engine in process."""
    measures, scale = Measures(), setting.scale
    engine = EngineThread(setting)
    try:
        with (
            serving(flags.bundle, flags.of(scale.max_model_len, with_teacher=False)) as ready,
            Wire(ready) as wire,
        ):
            for current in measures.rounds(scale.num_rounds):
                for batch in scale.wire_batches:
                    _compare_once(current, setting, engine, wire, batch)
    finally:
        engine.stop()
    return measures


def _compare_once(
    current: Round, setting: CheckSetting, engine: EngineThread, wire: Wire, batch: int
) -> None:
    scale = setting.scale
    prompts = setting.prompts.draw(batch, scale.prompt_tokens)
    speeds: dict[str, float] = {}
    for side in current.order(["in process", "gRPC"]):
        if side == "gRPC":
            speeds[side] = _wire_tokens_per_s(wire, prompts, scale.wire_tokens)
        else:
            speeds[side] = engine.tokens_per_s(prompts, scale.wire_tokens)
        current.add(f"{side}, {batch} at once", "tokens/s", speeds[side])
    ratio = speeds["gRPC"] / speeds["in process"]
    current.add(f"gRPC over in process, {batch} at once", "×", ratio, GRPC_TARGET)


def _wire_tokens_per_s(wire: Wire, prompts: Sequence[Sequence[int]], max_tokens: int) -> float:
    requests = [
        student_request(prompt, max_tokens, number, is_shadowed=False)
        for number, prompt in enumerate(prompts)
    ]
    started_s = time.perf_counter()
    streams = wire.stream_all(requests)
    seconds = max(stream.ended_s for stream in streams) - started_s
    return sum(len(stream.token_times_s) for stream in streams) / seconds


def shadow(setting: CheckSetting, flags: ServerFlags) -> Measures:
    """The student's inter-token latency with every request scored by the teacher over without.

    In a closed loop a stream goes on when its scores are there: then a lone stream never decodes
    beside the scoring. "Overlapping" streams go on with the last token.
    """
    measures, scale = Measures(), setting.scale
    with (
        serving(flags.bundle, flags.of(scale.max_model_len, with_teacher=True)) as ready,
        Wire(ready) as wire,
    ):
        for current in measures.rounds(scale.num_rounds):
            for num_streams in scale.shadow_streams:
                for waits in (True, False):
                    _shadow_once(current, setting, wire, num_streams, waits)
    return measures


def _shadow_once(
    current: Round, setting: CheckSetting, wire: Wire, num_streams: int, waits: bool
) -> None:
    label = f"{num_streams} {'closed loop' if waits else 'overlapping'}"
    percentiles: dict[bool, tuple[float, float]] = {}
    for is_shadowed in current.order([False, True]):
        streams = _run_streams(current, setting, wire, num_streams, waits, is_shadowed)
        percentiles[is_shadowed] = _percentiles(streams)
        name = f"{label}, {'shadowed' if is_shadowed else 'unshadowed'}"
        current.add(f"{name}: p50", "ms", 1e3 * percentiles[is_shadowed][0])
        current.add(f"{name}: p99", "ms", 1e3 * percentiles[is_shadowed][1])
    p50, p99 = (a / b for a, b in zip(percentiles[True], percentiles[False], strict=True))
    current.add(f"{label}: p50 shadowed over unshadowed", "×", p50, SHADOW_TARGET)
    current.add(f"{label}: p99 shadowed over unshadowed", "×", p99)


def _run_streams(
    current: Round,
    setting: CheckSetting,
    wire: Wire,
    num_streams: int,
    waits: bool,
    is_shadowed: bool,
) -> list[Stream]:
    scale = setting.scale
    requests = [
        [
            student_request(prompt, scale.new_tokens, seed, is_shadowed=is_shadowed)
            for seed, prompt in enumerate(
                setting.prompts.draw(scale.shadow_requests, scale.prompt_tokens)
            )
        ]
        for _ in range(num_streams)
    ]
    before = wire.scrape()
    streams = wire.stream_in_loops(requests, waits_for_scores=waits)
    after = wire.scrape()
    label = f"{num_streams} {'closed loop' if waits else 'overlapping'}"
    name = f"{label}, {'shadowed' if is_shadowed else 'unshadowed'}"
    for role, phase in (("student", "decode"), ("teacher", "score"), ("teacher", "decode")):
        mean_s, count = mean_step_s(before, after, role, phase)
        if count:
            current.add(f"{name}: mean {role} {phase} step", "ms", 1e3 * mean_s)
    return streams


def _percentiles(streams: Sequence[Stream]) -> tuple[float, float]:
    """Return p50 and p99 of the seconds between tokens, over all streams."""
    latencies_s = [latency_s for stream in streams for latency_s in stream.latencies_s]
    p50_s, p99_s = np.percentile(latencies_s, [50, 99])
    return float(p50_s), float(p99_s)
