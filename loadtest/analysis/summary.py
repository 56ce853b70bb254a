"""What a run comes to: plain data for the report, the gate and comparisons, and its JSON.

How it is computed: `analysis`. Only requests of `Phase.MEASURED` count anywhere in here. Seconds
throughout; every interval is a 95 % one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from bundle.errors import UserError
from estimators.estimate import Estimate

SUMMARY_FILE = "summary.json"

# gRPC codes that are answers about load or time; all others but OK are errors.
_OUTCOMES = {
    "OK": "ok",
    "RESOURCE_EXHAUSTED": "rejected",
    "DEADLINE_EXCEEDED": "deadline",
    "CANCELLED": "cancelled",
}


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts between ascending edges; one more edge than counts.

    The first edge is 0, the second the least one of a logarithmic scale: the first bin holds what
    is too small for it, exact zeros included.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Distribution:
    """Latency in seconds. A percentile is None when less than one value is expected above it."""

    count: int
    mean: float | None
    p50: Estimate | None
    p90: Estimate | None
    p95: Estimate | None
    p99: Estimate | None


@dataclass(frozen=True, slots=True)
class Quality:
    """How right the answers were, and how far from the other model (nats per token).

    None or empty: nothing to judge, or no divergence known. `k3_by_position[i]` is the mean over
    the samples that have a token i.
    """

    pass_at_k: dict[int, Estimate]
    majority_correct: Estimate | None
    k3: Estimate | None
    exact_kl: Estimate | None
    k3_histogram: Histogram | None
    k3_by_position: tuple[Estimate, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm at one load: requests per second, or in closed loops requests at a time.

    `statuses` counts gRPC codes, `goodput` is the share of offered requests that met the SLO.
    Latency is that of OK requests.
    """

    arm: str
    load: float
    num_offered: int
    statuses: dict[str, int]
    ttft: Distribution
    itl: Distribution
    tpot: Distribution
    e2e: Distribution
    itl_histogram: Histogram | None
    throughput_rps: float
    output_tokens_per_s: float
    goodput: Estimate | None
    quality: Quality | None

    @property
    def outcomes(self) -> dict[str, int]:
        """Count requests by ok, error, rejected, deadline, cancelled; what is 0 is left out."""
        counts: dict[str, int] = {}
        for status, count in self.statuses.items():
            outcome = _OUTCOMES.get(status, "error")
            counts[outcome] = counts.get(outcome, 0) + count
        return counts


@dataclass(frozen=True, slots=True)
class ArmComparison:
    """Two arms on the same requests at one load.

    `ratios` say how many times as fast a is: of times b/a, of `output_tokens_per_s` (a request's
    tokens over its seconds) a/b. They are taken over the pairs that both arms ended OK.
    `differences` are a − b by metric, `pass@K` and `majority`: −0.05 reads "a is 5 points worse".
    `agreement` is the share of pairs whose majority answers are the same.
    """

    load: float
    arm_a: str
    arm_b: str
    num_pairs: int
    ratios: dict[str, Estimate]
    differences: dict[str, Estimate]
    mcnemar_p: float | None
    agreement: Estimate | None


@dataclass(frozen=True, slots=True)
class Validity:
    """Whether the client was good enough to be believed; `problems` name numbers and limits."""

    is_valid: bool
    problems: tuple[str, ...]
    send_lag_p99_s: float | None
    max_client_cpu_share: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """All of `summary.json`. `config` is the RunConfig as JSON; `num_errors` as in `outcomes`.

    `notes` say what went wrong with the server: it began anew, or its metrics were gone.
    """

    config: dict[str, object]
    schedule_sha256: str
    versions: dict[str, str]
    models: tuple[dict[str, object], ...]
    validity: Validity
    num_errors: int
    cells: tuple[Cell, ...]
    comparisons: tuple[ArmComparison, ...]
    cross_check: dict[str, object] | None = None
    is_interrupted: bool = False
    notes: tuple[str, ...] = ()

    @property
    def num_failed(self) -> int:
        """Requests that were not answered, without those that the run itself gave up."""
        given_up = "cancelled" if self.is_interrupted else None
        return sum(
            count
            for cell in self.cells
            for outcome, count in cell.outcomes.items()
            if outcome not in ("ok", given_up)
        )

    @property
    def num_offered(self) -> int:
        return sum(cell.num_offered for cell in self.cells)

    def cell(self, arm: str, load: float) -> Cell | None:
        return next((c for c in self.cells if (c.arm, c.load) == (arm, load)), None)

    @property
    def loads(self) -> tuple[float, ...]:
        return tuple(sorted({cell.load for cell in self.cells}))


_SUMMARY = TypeAdapter(Summary)


def to_json(summary: Summary) -> str:
    return _SUMMARY.dump_json(summary, indent=2).decode() + "\n"


def from_json(text: str) -> Summary:
    """Return what `to_json` wrote. ValueError: it is something else."""
    return _SUMMARY.validate_json(text)


def read_summary(folder: Path) -> Summary:
    """Return a run's summary. UserError: the folder has none, or a broken one."""
    path = folder / SUMMARY_FILE
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        is_dead = (folder / "run.json").is_file()
        hint = f"; if the run died, `tandem loadtest report {folder}` sums it up" if is_dead else ""
        raise UserError(f"{path} cannot be read: {error.strerror}{hint}") from None
    except ValueError as error:
        raise UserError(f"{path} is not what a run writes: {error}") from None
