"""What one engine costs on an idle machine: host time, decode, prefill, slots, samples, scoring."""

from __future__ import annotations

import statistics
import time

import torch

from bench.engine.driver import CheckSetting, Driver, EngineStep, drawn, greedy
from bench.engine.measures import Measures, Round, at_least, at_most
from serve.engine.sequence import GenerationRequest, Sequence, make_group, make_sequences
from serve.models.noise import MAX_PATH_NOISE_NATS, measure_noise_floor
from serve.sampling.params import SamplingParams
from serve.sampling.sampler import Sampler

HOST_TARGET = at_most(0.3)
SLOTS_TARGET = at_most(1.05)
SAMPLES_TARGET = at_most(1.3)
SCORING_TARGET = at_least(6)


def host_time(setting: CheckSetting) -> Measures:
    """Milliseconds of a decode step that are not the model, and those between the steps."""
    measures, scale = Measures(), setting.scale
    driver = setting.student()
    modes = {"greedy": greedy(scale.new_tokens), "temperature 1": drawn(scale.new_tokens)}
    for current in measures.rounds(scale.num_rounds):
        for batch in scale.host_batches:
            for mode, sampling in modes.items():
                driver.generate(setting.prompts.draw(batch, scale.prompt_tokens), sampling)
                _add_host_time(current, driver, batch, mode)
                sampler_s = _time_sampler(setting, driver, batch, sampling)
                current.add(f"sampler alone, {batch} {mode}", "ms", 1e3 * sampler_s)
    return measures


def _add_host_time(current: Round, driver: Driver, batch: int, mode: str) -> None:
    host_s = statistics.median(step.host_s for step in driver.log.decodes(batch))
    target = HOST_TARGET if batch == 16 else None
    current.add(f"host per step, {batch} {mode}", "ms", 1e3 * host_s, target)
    # What `host_s` leaves out: emitting events, commands, deadlines, the search for work.
    pairs = driver.log.decode_pairs(batch)
    loop_s = statistics.median(b.ended_s - a.ended_s - b.model_s for a, b in pairs)
    current.add(f"step to step less model, {batch} {mode}", "ms", 1e3 * loop_s)


@torch.no_grad()
def _time_sampler(
    setting: CheckSetting, driver: Driver, batch: int, sampling: SamplingParams
) -> float:
    """Return the median seconds of a sampler call, each behind a real decode step."""
    prompts = setting.prompts.draw(batch, setting.scale.prompt_tokens)
    sequences = [_sequence(prompt, sampling) for prompt in prompts]
    sampler, backend = Sampler(frozenset()), driver.backend
    torch.set_num_threads(1)
    logits, seconds = backend.forward(0, prompts, [0] * batch), []
    for num_steps in range(setting.scale.new_tokens):
        started_s = time.perf_counter()
        sampled = sampler.sample(logits, sequences)
        seconds.append(time.perf_counter() - started_s)
        new = [[token_id] for token_id in sampled.token_ids]
        logits = backend.forward(0, new, [len(prompt) + num_steps for prompt in prompts])
    return statistics.median(seconds)


def _sequence(prompt: list[int], sampling: SamplingParams) -> Sequence:
    group = make_group(GenerationRequest("r", tuple(prompt), sampling), lambda events: None, 0.0)
    (sequence,) = make_sequences(group)
    return sequence


def decode(setting: CheckSetting) -> Measures:
    """Step time and throughput by batch, student and teacher in turns."""
    measures, scale = Measures(), setting.scale
    drivers = {"student": setting.student(), "teacher": setting.teacher()}
    for current in measures.rounds(scale.num_rounds):
        for batch in scale.batches:
            for name in current.order(list(drivers)):
                prompts = setting.prompts.draw(batch, scale.prompt_tokens)
                intervals_s = _decode_intervals(drivers[name], prompts, scale.new_tokens)
                median_s = statistics.median(intervals_s)
                current.add(f"{name} step, {batch}", "ms", 1e3 * median_s)
                mean_s = statistics.mean(intervals_s)
                current.add(f"{name} decode, {batch}", "tokens/s", batch / mean_s)
    return measures


def _decode_intervals(driver: Driver, prompts: list[list[int]], new_tokens: int) -> list[float]:
    """Return seconds from one decode step of all prompts to the next."""
    driver.generate(prompts, greedy(new_tokens))
    pairs = driver.log.decode_pairs(len(prompts))
    return [after.ended_s - before.ended_s for before, after in pairs]


def prefill(setting: CheckSetting) -> Measures:
    """Prompt tokens per second until the first token, one prompt alone and several at once."""
    measures, scale = Measures(), setting.scale
    drivers = {"student": setting.student(), "teacher": setting.teacher()}
    shapes = [(1, tokens) for tokens in scale.prefill_tokens]
    shapes.append((scale.num_samples, scale.prompt_tokens))
    for current in measures.rounds(scale.num_rounds):
        for num_prompts, tokens in shapes:
            for name in current.order(list(drivers)):
                prompts = setting.prompts.draw(num_prompts, tokens)
                readers = drivers[name].generate(prompts, greedy(1))
                seconds = max(reader.ended_s for reader in readers) - readers[0].submitted_s
                shape = f"{num_prompts} × {tokens}"
                speed = num_prompts * tokens / seconds
                current.add(f"{name} prefill, {shape}", "tokens/s", speed)
                current.add(f"{name} first tokens, {shape}", "ms", 1e3 * seconds)
    return measures


def slots(setting: CheckSetting) -> Measures:
    """Step time of one running sequence with 16 slots allocated over 1 slot."""
    measures, scale = Measures(), setting.scale
    drivers = {num_slots: setting.student(num_slots) for num_slots in (1, 16)}
    for current in measures.rounds(scale.num_rounds):
        prompt = setting.prompts.draw(1, scale.prompt_tokens)
        steps_s: dict[int, float] = {}
        for num_slots in current.order(list(drivers)):
            intervals_s = _decode_intervals(drivers[num_slots], prompt, scale.new_tokens)
            steps_s[num_slots] = statistics.median(intervals_s)
            current.add(f"step of 1 sequence, {num_slots} slots", "ms", 1e3 * steps_s[num_slots])
        current.add("16 slots over 1", "×", steps_s[16] / steps_s[1], SLOTS_TARGET)
    return measures


def samples(setting: CheckSetting) -> Measures:
    """Time to first token of all samples of one prompt over that of one sample."""
    measures, scale = Measures(), setting.scale
    driver = setting.student()
    for current in measures.rounds(scale.num_rounds):
        ttft_s: dict[int, float] = {}
        for num_samples in current.order([1, scale.num_samples]):
            prompt = setting.prompts.draw(1, scale.prompt_tokens)
            (reader,) = driver.generate(prompt, drawn(2, num_samples))
            ttft_s[num_samples] = reader.ttft_s
            current.add(f"first tokens of {num_samples} samples", "ms", 1e3 * reader.ttft_s)
        ratio = ttft_s[scale.num_samples] / ttft_s[1]
        current.add(f"{scale.num_samples} samples over 1", "×", ratio, SAMPLES_TARGET)
    return measures


def scoring(setting: CheckSetting) -> Measures:
    """How many times faster the teacher scores samples of a prompt than it draws them."""
    measures, scale = Measures(), setting.scale
    driver = setting.teacher()
    with torch.no_grad():
        path_nats = measure_noise_floor(driver.backend).path_nats
    # Above it the server has the teacher score by forced decoding, which is no faster.
    limit = at_most(MAX_PATH_NOISE_NATS)
    measures.add("one pass and decoding differ by", "nats", path_nats, limit)
    for current in measures.rounds(scale.num_rounds):
        (prompt,) = setting.prompts.draw(1, scale.prompt_tokens)
        started_s = time.perf_counter()
        (reader,) = driver.generate([prompt], drawn(scale.new_tokens, scale.num_samples))
        generated_s = time.perf_counter()
        driver.log.clear()
        driver.score(prompt, reader.completions)
        scored_s = time.perf_counter()
        current.add("generate", "ms", 1e3 * (generated_s - started_s))
        current.add("score", "ms", 1e3 * (scored_s - generated_s))
        current.add("score, the model's part", "ms", 1e3 * _model_s(driver.log.steps))
        ratio = (generated_s - started_s) / (scored_s - generated_s)
        current.add("generating over scoring", "×", ratio, SCORING_TARGET)
    return measures


def _model_s(steps: list[EngineStep]) -> float:
    return sum(step.model_s for step in steps)


def prefix(setting: CheckSetting) -> Measures:
    """Time to first token of a repeated prompt over the first time."""
    measures, scale = Measures(), setting.scale
    driver = setting.student()
    for current in measures.rounds(scale.num_rounds):
        (prompt,) = setting.prompts.draw(1, scale.repeated_prompt_tokens)
        ttft_s = []
        for time_name in ("first", "second"):
            reader = driver.submit(prompt, greedy(2), cache_salt="bench")
            driver.run()
            ttft_s.append(reader.ttft_s)
            current.add(f"{time_name} time, {len(prompt)} tokens", "ms", 1e3 * reader.ttft_s)
        current.add("second over first", "×", ttft_s[1] / ttft_s[0])
        num_cached = reader.endings[0].num_cached_prompt_tokens
        current.add("tokens from the cache", "tokens", num_cached)
    return measures
