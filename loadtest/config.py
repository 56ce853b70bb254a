"""What a load test is told, and its service level objectives: what latency is good enough.

Values out of bounds fail at the start, by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from loadtest.records import RequestRecord
from serve.addresses import parse_target

Arrival = Literal["poisson", "constant", "trace", "closed"]
Protocol = Literal["tandem", "oip"]
BUILTIN = "builtin"
Metric = Literal["ttft", "itl", "tpot", "e2e"]
METRICS: tuple[Metric, ...] = get_args(Metric)

_OBJECTIVE = re.compile(rf"({'|'.join(METRICS)})_p([0-9]+(?:\.[0-9]+)?)=([^=]+)")


class RunConfig(BaseModel):
    """The settings of `tandem loadtest run`; its flags are named alike."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    target: str = Field(
        default="127.0.0.1:50051", description="The server's address: HOST:PORT or unix:/PATH."
    )
    protocol: Protocol = Field(
        default="tandem",
        description="What the server speaks: Tandem's protocol or the Open Inference Protocol.",
    )
    metrics_url: str | None = Field(
        default=None,
        description="Hold the run against the server's own counts, read at this URL of its "
        "/metrics. By default it is not.",
    )
    arms: tuple[str, ...] = Field(
        default=("student", "teacher"), min_length=1, max_length=4,
        description="Which models of the server are tested, 1 to 4; the first is compared with "
        "each other one.",
    )  # fmt: skip
    out: Path = Field(
        description="The folder of the results, which is made. It has no default, and must be "
        "empty without --overwrite."
    )
    journal: Path | None = Field(
        default=None,
        description="Keep a journal of every request and answer in this folder, for `python -m "
        "loadtest.ledger FOLDER`. By default there is none.",
    )

    dataset: str = Field(
        default=BUILTIN,
        description="What is asked: builtin tasks, a JSONL file, or random words by "
        "synthetic:PROMPT_WORDSxMAX_TOKENS.",
    )
    max_prompts: int = Field(
        default=200, ge=1, description="How many prompts of the dataset are used: its first ones."
    )
    num_samples: int = Field(
        default=1, ge=1, le=64, description="How many samples each request asks for, 1 to 64."
    )
    max_tokens: int = Field(
        default=64, ge=1, description="How many tokens a sample may have at the most."
    )
    temperature: float = Field(
        default=1.0, ge=0, le=10, description="At which temperature is sampled, 0 (greedy) to 10."
    )
    pass_at_k: tuple[int, ...] = Field(
        default=(),
        description="For which k pass@k is reported, each up to --num-samples. By default 1 and "
        "--num-samples.",
    )

    arrival: Arrival = Field(
        default="poisson",
        description="How requests come: at random, evenly, at the times of --trace, or whenever "
        "one of --concurrency has ended.",
    )
    rates_rps: tuple[float, ...] = Field(
        default=(1.0,),
        description="At which rates an arm is tested in an open loop, in requests per second.",
    )
    concurrency: tuple[int, ...] = Field(
        default=(4,),
        description="At which concurrency an arm is tested in a closed loop, in requests.",
    )
    trace: Path | None = Field(
        default=None,
        description="The file of arrival times for --arrival trace, one in seconds per line; those "
        "below --duration are played. No default.",
    )
    duration_s: float = Field(
        default=60.0, gt=0, description="How many seconds each arm is tested at each load."
    )
    warmup_s: float = Field(
        default=10.0, ge=0,
        description="How many seconds each arm is warmed up at the lowest load, not counted.",
    )  # fmt: skip
    block_s: float = Field(
        default=5.0, gt=0,
        description="How many seconds an arm has its turn before the next one's.",
    )  # fmt: skip
    gap_s: float = Field(
        default=1.0, ge=0, description="How many seconds are without load between two turns."
    )
    timeout_s: float = Field(
        default=60.0, gt=0, description="After how many seconds a request is given up."
    )
    connect_timeout_s: float = Field(
        default=10.0, gt=0,
        description="How many seconds to wait for the server before anything is sent.",
    )  # fmt: skip
    slo: str = Field(
        default="",
        description="Which latency is good, in seconds, such as ttft_p95=0.2,itl_p95=0.02. By "
        "default there is no SLO, and no goodput.",
    )
    max_failure_rate: float = Field(
        default=0.0, ge=0, le=1,
        description="Which share of the requests may fail, 0 to 1; beyond it the exit code is 4.",
    )  # fmt: skip
    divergence: Literal["k3", "exact", "none"] = Field(
        default="k3",
        description="What the other model scores when the load is over: k3 of each token, the "
        "exact KL as well, or nothing.",
    )
    processes: int = Field(
        default=1, ge=1, le=16, description="How many client processes send the load, 1 to 16."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63,
        description="The seed of arrivals, prompts, order of arms and sampling, 0 to 2⁶³ − 1.",
    )  # fmt: skip

    @field_validator("target")
    @classmethod
    def _check_target(cls, target: str) -> str:
        return parse_target(target)

    @field_validator("slo")
    @classmethod
    def _check_slo(cls, slo: str) -> str:
        parse_slo(slo)
        return slo

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms are {', '.join(self.arms)}; each may be given once")
        if (self.arrival == "trace") != (self.trace is not None):
            raise ValueError("arrival trace and --trace FILE belong together; give both or none")
        if self.journal is not None and self.protocol != "tandem":
            raise ValueError(
                "--journal takes --protocol tandem: the ledger knows its answers alone"
            )
        if any(rate <= 0 for rate in self.rates_rps) or not self.rates_rps:
            raise ValueError(f"rates are {self.rates_rps}; all must be above 0, at least one")
        if any(each < 1 for each in self.concurrency) or not self.concurrency:
            raise ValueError(
                f"concurrency is {self.concurrency}; all must be above 0, at least one"
            )
        for loads in (self.rates_rps, self.concurrency):
            if len(set(loads)) < len(loads):
                raise ValueError(f"loads are {loads}; each may be given once")
        if any(k > self.num_samples or k < 1 for k in self.pass_at_k):
            raise ValueError(f"pass_at_k is {self.pass_at_k}; each is 1 to {self.num_samples}")
        return self

    @property
    def is_open_loop(self) -> bool:
        return self.arrival != "closed"


@dataclass(frozen=True, slots=True)
class LatencyObjective:
    """`percentile` percent of the requests (of the tokens, for itl) take at most `limit_s`."""

    metric: Metric
    percentile: float
    limit_s: float

    @property
    def share(self) -> float:
        return self.percentile / 100

    def __str__(self) -> str:
        return f"{self.metric}_p{self.percentile:g}={self.limit_s:g}"

    def is_met_by(self, record: RequestRecord) -> bool:
        """Return whether the request ended OK within the limit.

        Its inter-token latencies are within it when their own share below is the percentile. A
        request of one token has none to miss; one without tokens has no time to the first.
        """
        if not record.is_ok:
            return False
        if self.metric == "itl":
            itls_s = record.itls_s
            num_within = sum(itl_s <= self.limit_s for itl_s in itls_s)
            return 100 * num_within >= self.percentile * len(itls_s)
        if self.metric == "tpot":
            return record.tpot_s is None or record.tpot_s <= self.limit_s
        value_s = record.ttft_s if self.metric == "ttft" else record.e2e_s
        return value_s is not None and value_s <= self.limit_s


@dataclass(frozen=True, slots=True)
class Tally:
    """How many of the offered requests met one objective."""

    objective: LatencyObjective
    num_good: int
    num_offered: int


@dataclass(frozen=True, slots=True)
class Slo:
    """All objectives of a run; none: nothing is promised."""

    objectives: tuple[LatencyObjective, ...]

    def is_good(self, record: RequestRecord) -> bool:
        """Return whether a request counts for goodput: OK and within every limit."""
        return record.is_ok and all(each.is_met_by(record) for each in self.objectives)

    def tallies(self, records: Iterable[RequestRecord]) -> tuple[Tally, ...]:
        """Return each objective's count; requests that failed were offered, too."""
        offered = list(records)
        return tuple(
            Tally(each, sum(map(each.is_met_by, offered)), len(offered)) for each in self.objectives
        )


def parse_slo(text: str) -> Slo:
    """Return the objectives of a list such as `RunConfig.slo`; blank: none.

    Raises:
        ValueError: names the piece and what is allowed.

    >>> [str(objective) for objective in parse_slo("ttft_p95=0.2, e2e_p99.9=5").objectives]
    ['ttft_p95=0.2', 'e2e_p99.9=5']
    >>> parse_slo("ttft_p95=soon")
    Traceback (most recent call last):
        ...
    ValueError: slo 'ttft_p95=soon': 'soon' is no limit; give seconds above 0
    """
    if not text.strip():
        return Slo(())
    objectives = tuple(_parse_objective(piece.strip()) for piece in text.split(","))
    names = [str(each).partition("=")[0] for each in objectives]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"slo {text!r}: {name} is given {names.count(name)} times; give one")
    return Slo(objectives)


def _parse_objective(piece: str) -> LatencyObjective:
    match = _OBJECTIVE.fullmatch(piece)
    if match is None:
        raise ValueError(
            f"slo {piece!r}: write METRIC_pPERCENTILE=SECONDS, such as ttft_p95=0.2;"
            f" metrics are {', '.join(METRICS)}"
        )
    metric = next(each for each in METRICS if each == match[1])
    percentile = float(match[2])
    if not 50 <= percentile <= 99.9:
        raise ValueError(f"slo {piece!r}: percentiles are p50 to p99.9")
    return LatencyObjective(metric, percentile, _parse_limit_s(piece, match[3]))


def _parse_limit_s(piece: str, text: str) -> float:
    try:
        limit_s = float(text)
    except ValueError:
        limit_s = 0.0
    if not 0 < limit_s < float("inf"):
        raise ValueError(f"slo {piece!r}: {text!r} is no limit; give seconds above 0")
    return limit_s
