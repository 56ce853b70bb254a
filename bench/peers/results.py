"""What a comparison measured: raw seconds, kept in one JSON file, and medians and ratios of them.

A ratio is taken pair by pair, within a round, before the median over the rounds: what slows the
machine down for a while slows both sides of a pair.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bundle.errors import UserError

MAX_KL_NATS = 0.02
"""Gate of the "best variant": mean KL to the float student, per token."""


@dataclass(frozen=True, slots=True)
class Config:
    """What is measured; a file is resumed with the same one only."""

    manifest_sha256: str
    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    prefill_tokens: tuple[int, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """One side in one round. `kind` is "decode" of `size` sequences or "prefill" of `size` tokens.

    `short_s` is a run that makes one token; `long_s` makes `Config.new_tokens` (decode only).
    `foreign_share` is the part of all cores that other processes took meanwhile.
    """

    round: int
    side: str
    kind: str
    size: int
    short_s: float
    long_s: float | None = None
    foreign_share: float = 0.0


@dataclass(slots=True)
class SideRecord:
    """What is known of a side beside its seconds. `absent` says why it was not (fully) measured."""

    weights: str
    versions: dict[str, str] = field(default_factory=dict)
    load_s: float | None = None
    peak_memory_bytes: int | None = None
    kl_nats: float | None = None
    kl_source: str = "not measured"
    absent: str | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """Median over the rounds, with the least and the greatest."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(slots=True)
class Results:
    """A whole comparison; `machine` is free text by name."""

    machine: dict[str, Any]
    config: Config
    sides: dict[str, SideRecord] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)

    def values(self, side: str, kind: str, size: int) -> dict[int, float]:
        """Return tokens per second (decode) or seconds (prefill) by round.

        "run" is "decode" over the whole run, prefill included.
        """
        wanted = "prefill" if kind == "prefill" else "decode"
        return {
            m.round: _value(m, kind, self.config.new_tokens)
            for m in self.measurements
            if (m.side, m.kind, m.size) == (side, wanted, size)
        }

    def spread(self, side: str, kind: str, size: int) -> Spread | None:
        values = self.values(side, kind, size)
        return Spread.of(list(values.values())) if values else None

    def ratio(self, ours: str, theirs: str, kind: str, size: int) -> Spread | None:
        """Return how many times faster `ours` is, None where no round has both."""
        a, b = self.values(ours, kind, size), self.values(theirs, kind, size)
        rounds = sorted(a.keys() & b.keys())
        if not rounds:
            return None
        is_seconds = kind == "prefill"
        return Spread.of([b[r] / a[r] if is_seconds else a[r] / b[r] for r in rounds])

    def best_variant(self) -> str | None:
        """Return Tandem's ONNX side with KL ≤ `MAX_KL_NATS` that decodes fastest.

        By the geometric mean over the batches: one variant is served, not one for each batch.
        """
        speeds = {
            name: self._mean_speed(name)
            for name, record in self.sides.items()
            if name.startswith("tandem-") and name != "tandem-torch"
            if record.kl_nats is not None and record.kl_nats <= MAX_KL_NATS
        }
        measured = {name: speed for name, speed in speeds.items() if speed is not None}
        return max(measured, key=measured.__getitem__) if measured else None

    def _mean_speed(self, side: str) -> float | None:
        spreads = [self.spread(side, "decode", batch) for batch in self.config.batches]
        if not all(spreads):
            return None
        return math.prod(s.median for s in spreads if s) ** (1 / len(spreads))

    def save(self, path: Path, derived: Mapping[str, Any]) -> None:
        """Write everything, `derived` tables included, in one step."""
        document = {
            "machine": self.machine,
            "config": asdict(self.config),
            "sides": {name: asdict(record) for name, record in self.sides.items()},
            **derived,
            "measurements": [asdict(m) for m in self.measurements],
        }
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(path)


def read_results(path: Path) -> Results:
    """Return what a file holds; its derived tables are computed anew."""
    document = json.loads(path.read_text("utf-8"))
    config: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in document["config"].items()
    }
    return Results(
        document["machine"],
        Config(**config),
        {name: SideRecord(**record) for name, record in document["sides"].items()},
        [Measurement(**m) for m in document["measurements"]],
    )


def resume(path: Path, config: Config) -> Results:
    """Return the results to go on with. Raises UserError when they are of another `config`."""
    results = read_results(path)
    if results.config != config:
        raise UserError(f"{path} was measured with {results.config}; this run has {config}")
    return results


def _value(m: Measurement, kind: str, new_tokens: int) -> float:
    if kind == "prefill":
        return m.short_s
    assert m.long_s is not None, m
    if kind == "run":
        return new_tokens * m.size / m.long_s
    assert m.long_s > m.short_s, m
    return (new_tokens - 1) * m.size / (m.long_s - m.short_s)
