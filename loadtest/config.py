"""What a load test is told. Values out of bounds fail at its start, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serve.addresses import parse_target

Arrival = Literal["poisson", "constant", "trace", "closed"]
Protocol = Literal["tandem", "oip"]
BUILTIN = "builtin"


class RunConfig(BaseModel):
    """The settings of `tandem loadtest run`; its flags are named alike."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    target: str = Field(
        default="127.0.0.1:50051", description="HOST:PORT or unix:/PATH of the server"
    )
    protocol: Protocol = Field(default="tandem", description="oip: Open Inference Protocol")
    metrics_url: str | None = Field(
        default=None, description="of the server's /metrics, for the cross-check"
    )
    arms: tuple[str, ...] = Field(
        default=("student", "teacher"), min_length=1, max_length=4,
        description="the first is compared with each other one; models of the server",
    )  # fmt: skip
    out: Path = Field(description="folder of the artifacts; made; see --overwrite")

    dataset: str = Field(
        default=BUILTIN, description="builtin, a JSONL file, or synthetic:PROMPT_WORDSxMAX_TOKENS"
    )
    max_prompts: int = Field(default=200, ge=1, description="of the dataset, its first ones")
    num_samples: int = Field(default=1, ge=1, le=64, description="of each request")
    max_tokens: int = Field(default=64, ge=1, description="per sample")
    temperature: float = Field(default=1.0, ge=0, le=10)
    pass_at_k: tuple[int, ...] = Field(default=(), description="none: 1 and num_samples")

    arrival: Arrival = Field(default="poisson", description="how requests come")
    rates_rps: tuple[float, ...] = Field(
        default=(1.0,), description="requests per second per arm (open loop)"
    )
    concurrency: tuple[int, ...] = Field(
        default=(4,), description="requests at a time per arm (closed loop)"
    )
    trace: Path | None = Field(
        default=None,
        description="one time in seconds per line; its first duration_s are played as they are",
    )
    duration_s: float = Field(default=60.0, gt=0, description="of load per arm and rate")
    warmup_s: float = Field(default=10.0, ge=0, description="before it, not counted")
    block_s: float = Field(default=5.0, gt=0, description="an arm's turn before the next one's")
    gap_s: float = Field(default=1.0, ge=0, description="without load between blocks")
    timeout_s: float = Field(default=60.0, gt=0, description="deadline of each request")
    connect_timeout_s: float = Field(
        default=10.0, gt=0, description="for the first connection, before anything is sent"
    )
    slo: str = Field(
        default="", description="such as ttft_p95=0.2,itl_p95=0.02: seconds, for goodput"
    )
    max_failure_rate: float = Field(
        default=0.0, ge=0, le=1,
        description="share of requests that may fail; beyond it the exit code is 4",
    )  # fmt: skip
    divergence: Literal["k3", "exact", "none"] = Field(
        default="k3",
        description="scored by the other model behind the load; exact: the full KL, too",
    )
    processes: int = Field(default=1, ge=1, le=16, description="client processes")
    seed: int = Field(default=0, ge=0, lt=2**63)

    @field_validator("target")
    @classmethod
    def _check_target(cls, target: str) -> str:
        return parse_target(target)

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms are {', '.join(self.arms)}; each may be given once")
        if (self.arrival == "trace") != (self.trace is not None):
            raise ValueError("arrival trace and --trace FILE belong together; give both or none")
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
