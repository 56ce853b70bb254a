"""The tables of a comparison: each side's figures, and the ratios with their targets."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from bench.peers.results import Results, SideRecord, Spread

# Targets by batch: decoding against …
GENAI_TARGETS = {1: 1.05, 8: 1.25, 16: 1.25}
ORTMODEL_TARGETS = {1: 3.0, 8: 2.0, 16: 2.0}
VLLM_TARGETS = {1: 2.5, 8: 1.6, 16: 1.5}
TRANSFORMERS_TARGETS = {1: 5.0, 8: 2.0}
TORCH_TARGETS = {1: 1.3, 8: 1.3}
PREFILL_TARGETS = {512: 1.0}


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster `ours` is than `theirs`; `size` is sequences, or prefilled tokens."""

    ours: str
    theirs: str
    kind: str
    size: int
    spread: Spread
    target: float | None

    @property
    def is_met(self) -> bool | None:
        return None if self.target is None else self.spread.median >= self.target


def ratios(results: Results) -> list[Ratio]:
    """Return all ratios that were measured, those with a target and those beside them."""
    rows = [
        _ratio(results, ours, theirs, "decode", batch, targets.get(batch))
        for ours, theirs, targets in _decode_pairs(results)
        for batch in results.config.batches
    ]
    best = results.best_variant()
    for size in results.config.prefill_tokens:
        peer = _best_prefill_peer(results, size)
        if best and peer:
            target = PREFILL_TARGETS.get(size)
            rows.append(_ratio(results, best, peer, "prefill", size, target))
    return [row for row in rows if row is not None]


def _decode_pairs(results: Results) -> Iterator[tuple[str, str, dict[int, float]]]:
    for name in results.sides:
        family, _, variant = name.partition("-")
        if family == "genai":
            yield f"tandem-{variant}", name, GENAI_TARGETS
        if family == "ortmodel":
            yield f"tandem-{variant}", name, ORTMODEL_TARGETS
    if best := results.best_variant():
        yield best, "vllm", VLLM_TARGETS
        yield best, "transformers", TRANSFORMERS_TARGETS
        yield best, "llamacpp", {}
    yield "tandem-torch", "transformers", TORCH_TARGETS
    yield "tandem-torch", "vllm", {}


def _ratio(
    results: Results, ours: str, theirs: str, kind: str, size: int, target: float | None
) -> Ratio | None:
    spread = results.ratio(ours, theirs, kind, size)
    return Ratio(ours, theirs, kind, size, spread, target) if spread else None


def _best_prefill_peer(results: Results, size: int) -> str | None:
    spreads = {
        name: spread.median
        for name in results.sides
        if not name.startswith("tandem-")
        if (spread := results.spread(name, "prefill", size))
    }
    return min(spreads, key=spreads.__getitem__) if spreads else None


def derived(results: Results) -> dict[str, Any]:
    """Return what the JSON file holds beside the raw seconds."""
    return {
        "best_variant": results.best_variant(),
        "summary": {
            name: {key: asdict(spread) for key, spread in _figures(results, name).items()}
            for name in results.sides
        },
        "ratios": [{**asdict(ratio), "is_met": ratio.is_met} for ratio in ratios(results)],
    }


def _figures(results: Results, side: str) -> dict[str, Spread]:
    config = results.config
    keys = [
        *(("decode", batch, f"decode_tokens_per_s_batch_{batch}") for batch in config.batches),
        *(("run", batch, f"run_tokens_per_s_batch_{batch}") for batch in config.batches),
        *(("prefill", size, f"prefill_{size}_s") for size in config.prefill_tokens),
    ]
    spreads = {name: results.spread(side, kind, size) for kind, size, name in keys}
    return {name: spread for name, spread in spreads.items() if spread}


def render(results: Results) -> str:
    """Return the tables as text: medians with (least–greatest) over the rounds."""
    lines = [*_side_lines(results), "", *_ratio_lines(results), "", *_kl_lines(results)]
    absent = [f"ABSENT {n}: {r.absent}" for n, r in results.sides.items() if r.absent]
    return "\n".join([*lines, *absent, *_foreign_lines(results)])


def _side_lines(results: Results) -> Iterator[str]:
    config = results.config
    yield f"Decode tokens/s (run: prefill of {config.prompt_tokens} included), prefill in ms"
    headers = [
        *(f"decode B={batch}" for batch in config.batches),
        *(f"run B={batch}" for batch in config.batches),
        *(f"prefill {size}" for size in config.prefill_tokens),
    ]
    yield f"{'':18}" + "".join(f"{header:>19}" for header in headers) + f"{'peak MiB':>10}"
    for name, record in results.sides.items():
        cells = [
            *(_cell(results.spread(name, "decode", batch), 1) for batch in config.batches),
            *(_cell(results.spread(name, "run", batch), 1) for batch in config.batches),
            *(_cell(results.spread(name, "prefill", size), 1e3) for size in config.prefill_tokens),
        ]
        yield f"{name:18}" + "".join(f"{cell:>19}" for cell in cells) + f"{_mib(record):>10}"


def _cell(spread: Spread | None, scale: float) -> str:
    if spread is None:
        return "–"
    return f"{spread.median * scale:.0f} ({spread.min * scale:.0f}–{spread.max * scale:.0f})"


def _mib(record: SideRecord) -> str:
    return "–" if record.peak_memory_bytes is None else f"{record.peak_memory_bytes / 2**20:.0f}"


def _ratio_lines(results: Results) -> Iterator[str]:
    yield f"Ratios, pair by pair within a round; best variant: {results.best_variant()}"
    for row in ratios(results):
        unit = "sequences" if row.kind == "decode" else "tokens"
        target = "" if row.target is None else f"  target ≥ {row.target:g}"
        verdict = {None: "", True: "  met", False: "  MISSED"}[row.is_met]
        yield (
            f"{row.kind:8}{row.size:4} {unit:10}{row.ours} / {row.theirs}: {row.spread.median:.2f}"
            f" ({row.spread.min:.2f}–{row.spread.max:.2f}){target}{verdict}"
        )


def _foreign_lines(results: Results) -> Iterator[str]:
    shares = [m.foreign_share for m in results.measurements]
    if shares:
        yield (
            f"Other processes took {statistics.median(shares):.1%} of the cores in the median "
            f"measurement, {max(shares):.1%} in the worst"
        )


def _kl_lines(results: Results) -> Iterator[str]:
    yield "KL(float student ‖ side), nats per token"
    for name, record in results.sides.items():
        value = "–" if record.kl_nats is None else f"{record.kl_nats:.4f}"
        yield f"{name:18}{record.weights:26}{value:>8}  {record.kl_source}"
