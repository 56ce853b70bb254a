"""What one engine bears: a long prompt beside short streams, many requests at once, a long run."""

from __future__ import annotations

import itertools
import os
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.engine.driver import CheckSetting, Driver, Reader, drawn, greedy
from bench.engine.measures import Measures, Round, at_least, at_most

MIB = 2**20
NUM_SHORT_STREAMS = 4
LONG_PROMPT_NEW_TOKENS = 2
MAX_GROWTH_SHARE = 0.05
MAX_GROWTH_BYTES = 32 * MIB


def long_context(setting: CheckSetting) -> Measures:
    """A long prompt alone and beside short streams, whose inter-token latency it may raise."""
    measures, scale = Measures(), setting.scale
    driver = setting.student(2 * NUM_SHORT_STREAMS, scale.long_model_len)
    for current in measures.rounds(scale.num_rounds):
        long_prompts = setting.prompts.draw(2, scale.long_prompt_tokens)
        alone = driver.submit(long_prompts[0], greedy(LONG_PROMPT_NEW_TOKENS))
        driver.run()
        current.add("first token of the long prompt, alone", "ms", 1e3 * alone.ttft_s)
        beside, shorts = _run_beside(setting, driver, long_prompts[1])
        current.add("first token, beside short streams", "ms", 1e3 * beside.ttft_s)
        current.add("beside short streams over alone", "×", beside.ttft_s / alone.ttft_s)
        _add_latencies(current, beside, shorts)
    return measures


def _run_beside(
    setting: CheckSetting, driver: Driver, long_prompt: list[int]
) -> tuple[Reader, list[Reader]]:
    """Start short streams, and the long prompt when each of them has some tokens."""
    scale = setting.scale
    prompts = setting.prompts.draw(NUM_SHORT_STREAMS, scale.prompt_tokens)
    shorts = [driver.submit(prompt, greedy(scale.short_tokens)) for prompt in prompts]
    long: Reader | None = None
    for _ in driver.work():
        if long is None and all(len(r.token_times_s[0]) > scale.short_tokens // 4 for r in shorts):
            long = driver.submit(long_prompt, greedy(LONG_PROMPT_NEW_TOKENS))
    assert long is not None and long.completions, "the long prompt is answered"
    return long, shorts


def _add_latencies(current: Round, long: Reader, shorts: list[Reader]) -> None:
    first_token_s = long.token_times_s[0][0]
    before, meanwhile, after = [], [], []
    for reader in shorts:
        for earlier_s, later_s in itertools.pairwise(reader.token_times_s[0]):
            if later_s <= long.submitted_s:
                before.append(later_s - earlier_s)
            elif earlier_s < first_token_s:
                meanwhile.append(later_s - earlier_s)
            else:
                after.append(later_s - earlier_s)
    assert after, "the short streams outlast the long prompt's prefill"
    for name, latencies_s in (("before it", before), ("meanwhile", meanwhile)):
        p50_s, p99_s = np.percentile(latencies_s, [50, 99])
        current.add(f"short streams' p50 latency {name}", "ms", 1e3 * float(p50_s))
        current.add(f"short streams' p99 latency {name}", "ms", 1e3 * float(p99_s))


def mixed(setting: CheckSetting) -> Measures:
    """Requests of mixed lengths, submitted at once: each ends once, with all of its tokens."""
    measures, scale = Measures(), setting.scale
    driver = setting.student()
    for current in measures.rounds(scale.num_rounds):
        rng = random.Random(f"{setting.seed}/mixed")
        started_s = time.perf_counter()
        readers, wanted = _submit_mixed(
            setting, driver, rng, scale.num_mixed, scale.mixed_prompt_tokens, scale.mixed_new_tokens
        )
        driver.run()
        seconds = time.perf_counter() - started_s
        counts = [len(reader.endings) for reader in readers]
        share = sum(map(_is_whole, readers, wanted)) / len(wanted)
        current.add("requests that end once and whole", "share", share, at_least(1))
        current.add("terminal events of a request, at most", "", max(counts), at_most(1))
        current.add("completion tokens", "tokens/s", sum(wanted) / seconds)
        ttfts_s = [reader.ttft_s for reader in readers]
        current.add("median first token", "ms", 1e3 * statistics.median(ttfts_s))
        current.add("all of it", "s", seconds)
    return measures


def _is_whole(reader: Reader, num_wanted: int) -> bool:
    return len(reader.endings) == 1 and len(reader.completions[0]) == num_wanted


def _submit_mixed(
    setting: CheckSetting,
    driver: Driver,
    rng: random.Random,
    num_requests: int,
    prompt_tokens: tuple[int, int],
    new_tokens: tuple[int, int],
) -> tuple[list[Reader], list[int]]:
    """Return readers, and how many tokens each of them shall get; with the prefix cache on."""
    readers, wanted = [], []
    for number in range(num_requests):
        (prompt,) = setting.prompts.draw(1, rng.randint(*prompt_tokens))
        wanted.append(rng.randint(*new_tokens))
        # Greedy and drawn ones side by side, as traffic has them.
        sampling = drawn(wanted[-1], seed=number) if number % 2 else greedy(wanted[-1])
        readers.append(driver.submit(prompt, sampling, cache_salt=""))
    return readers, wanted


def soak(setting: CheckSetting) -> Measures:
    """Resident memory over many requests of mixed lengths, in waves; flat in the second half."""
    measures, scale = Measures(), setting.scale
    driver = setting.student()
    num_whole, started_s, resident = 0, time.perf_counter(), []
    for num_ended, is_whole in _soak(setting, driver):
        num_whole += is_whole
        if num_ended % scale.soak_interval == 0:
            resident.append(resident_bytes())
            measures.add("resident memory", "MiB", resident[-1] / MIB)
    measures.add("all of it", "s", time.perf_counter() - started_s)
    share = num_whole / scale.num_soak
    measures.add("requests that end once and whole", "share", share, at_least(1))
    excess_bytes, allowed_bytes, slope_bytes = flatness(resident)
    target = at_most(allowed_bytes / MIB)
    measures.add("second half: most less mean", "MiB", excess_bytes / MIB, target)
    slope = slope_bytes / scale.soak_interval * 1000
    measures.add("second half: slope", "MiB per 1,000 requests", slope / MIB)
    return measures


def _soak(setting: CheckSetting, driver: Driver) -> Iterator[tuple[int, bool]]:
    """Yield after each request how many have ended, and whether this one did so whole."""
    scale, rng = setting.scale, random.Random(f"{setting.seed}/soak")
    num_ended = 0
    while num_ended < scale.num_soak:
        readers, wanted = _submit_mixed(
            setting,
            driver,
            rng,
            min(scale.soak_wave, scale.num_soak - num_ended),
            scale.soak_prompt_tokens,
            scale.soak_new_tokens,
        )
        running = dict(enumerate(readers))
        for _ in driver.work():
            for number in [n for n, reader in running.items() if reader.endings]:
                num_ended += 1
                yield num_ended, _is_whole(running.pop(number), wanted[number])
        driver.log.clear()


def flatness(resident: list[int]) -> tuple[float, float, float]:
    """Return of the second half: most less mean, what of it is allowed, slope per sample; bytes.

    >>> flatness([100, 900, 1000, 1000, 1000, 1060])
    (40, 33554432, 30.0)
    """
    second_half = resident[len(resident) // 2 :]
    mean = statistics.mean(second_half)
    slope = statistics.linear_regression(range(len(second_half)), second_half).slope
    return max(second_half) - mean, max(MAX_GROWTH_SHARE * mean, MAX_GROWTH_BYTES), slope


def resident_bytes() -> int:
    """Return this process's resident memory."""
    num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return num_pages * os.sysconf("SC_PAGE_SIZE")
