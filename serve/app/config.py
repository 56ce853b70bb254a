"""What a server is told at its start. Unknown keys and values out of bounds fail there, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serve.addresses import is_loopback, is_unix, parse_host
from serve.pair.answers.formats import compile_formats
from serve.pair.remote_address import RemoteAddress, is_remote

Backend = Literal["onnx", "torch"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["bfloat16", "float16", "float32"]


class ServeConfig(BaseModel):
    """The settings of `tandem serve`; its flags are named alike."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    bundle: Path | None = Field(
        default=None, description="folder of the bundle; required unless the teacher is alone"
    )
    teacher: Path | str | None = Field(
        default=None,
        description="folder, grpc://HOST:PORT, or grpc+unix:/PATH; none: the bundle's own",
    )
    no_teacher: bool = Field(default=False, description="the student alone")
    no_student: bool = Field(default=False, description="the teacher alone, for other servers")
    variant: str | None = Field(default=None, description="ONNX graph; none: the bundle's default")
    student_backend: Backend = Field(default="onnx", description="runs the student")
    teacher_backend: Backend = Field(default="torch", description="runs the teacher")
    teacher_dtype: Dtype = Field(default="bfloat16", description="of its weights in torch")
    device: Device = Field(default="auto", description="auto: CUDA where it is there")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of one step")

    teacher_timeout_s: float = Field(
        default=60.0, gt=0, description="of one scoring by a teacher elsewhere"
    )
    teacher_token_file: Path | None = Field(
        default=None, description="its first line is the token for a teacher elsewhere"
    )
    teacher_tls_ca: Path | None = Field(
        default=None, description="PEM that signs a teacher elsewhere; none: what gRPC trusts"
    )
    teacher_tls_cert: Path | None = Field(
        default=None, description="PEM shown to a teacher elsewhere"
    )
    teacher_tls_key: Path | None = Field(default=None, description="PEM key of teacher_tls_cert")

    host: str = Field(
        default="127.0.0.1", description="where clients call: a name, an address, or unix:/PATH"
    )
    port: int = Field(default=50051, ge=0, le=65535, description="0 picks a free one")
    control_host: str = Field(default="127.0.0.1", description="likewise of the control listener")
    control_port: int = Field(default=50052, ge=0, le=65535, description="0 picks a free one")
    metrics_host: str = Field(default="127.0.0.1", description="of /metrics and /healthz")
    metrics_port: int = Field(default=9464, ge=0, le=65535, description="0 picks a free one")
    insecure_listen: bool = Field(
        default=False, description="allow an open address without TLS and credentials"
    )
    reflection: bool = Field(default=False, description="gRPC server reflection")
    ready_file: Path | None = Field(
        default=None, description="written as JSON with the addresses when ready"
    )

    tls_cert: Path | None = Field(default=None, description="PEM chain; read again as it changes")
    tls_key: Path | None = Field(default=None, description="PEM key of tls_cert")
    tls_client_ca: Path | None = Field(
        default=None, description="PEM; clients must be signed by it"
    )
    auth_tokens: Path | None = Field(default=None, description="file of hashed tokens and scopes")
    max_concurrent_per_peer: int = Field(default=256, ge=1, description="calls of one client")

    max_num_seqs: int = Field(default=16, ge=1, le=1024, description="samples running per model")
    max_num_seqs_per_client: int | None = Field(
        default=None, ge=1, description="of them for one client; none: all, until others wait"
    )
    max_model_len: int = Field(default=2048, ge=2, description="prompt and completion tokens")
    max_waiting: int = Field(default=1024, ge=0, description="samples queued per model")
    max_pass_tokens: int | None = Field(
        default=None, ge=16, description="of a prefill or scoring pass; none: by the device"
    )
    prefix_cache_mib: int = Field(
        default=256, ge=0, description="of earlier prompts' keys and values per model; 0: none"
    )
    max_step_s: float = Field(
        default=120.0, gt=0, description="of one step of a model, which else counts as hung"
    )

    max_prompt_bytes: int = Field(default=1 << 20, ge=1, le=3 << 20, description="of a prompt")
    max_num_samples: int = Field(default=64, ge=1, le=64, description="of a request")
    max_completion_tokens: int | None = Field(
        default=None, ge=1, description="bound of max_tokens; none: the context"
    )
    max_timeout_s: float = Field(default=600.0, gt=0, description="deadline of every call at most")
    max_stall_s: float = Field(default=30.0, gt=0, description="until a client takes a response")
    max_replays: int = Field(
        default=1024, ge=0, description="answers kept for requests that come again by their id"
    )
    max_replay_mib: int = Field(default=16, ge=0, description="MiB of them")
    replay_ttl_s: float = Field(default=120.0, ge=0, description="how long they are kept")

    student_weight: float = Field(default=1.0, ge=0, le=1e6, description="of ROUTE_AUTO traffic")
    teacher_weight: float = Field(default=0.0, ge=0, le=1e6, description="of ROUTE_AUTO traffic")
    shadow_rate: float = Field(default=0.0, ge=0, le=1, description="scored behind the answer")
    max_shadows: int = Field(default=32, ge=0, description="that wait or run; more are dropped")
    shadow_timeout_s: float = Field(default=30.0, gt=0, description="then a shadow is given up")

    tasks: frozenset[str] = Field(default=frozenset(), description="task labels in metrics")
    answer_formats: dict[str, str] = Field(
        default_factory=dict, description="name → regular expression; group 1 is the answer"
    )
    symbolic_timeout_s: float = Field(default=2.0, gt=0, description="of one comparison")
    vllm_metrics: bool = Field(default=False, description="aliases named as vLLM names its metrics")
    log_requests: bool = Field(default=False, description="a line per call: never its text")

    drain_delay_s: float = Field(default=0.0, ge=0, description="not ready, but still serving")
    drain_grace_s: float = Field(default=30.0, ge=0, description="running work may take")

    @property
    def teacher_address(self) -> RemoteAddress | None:
        """Where a teacher elsewhere is; None for one that is loaded here, and for none."""
        return RemoteAddress.parse(self.teacher) if isinstance(self.teacher, str) else None

    @field_validator("teacher")
    @classmethod
    def _check_teacher(cls, teacher: Path | str | None) -> Path | str | None:
        """Keep an address as it is written; what is none is a folder."""
        if not isinstance(teacher, str):
            return teacher
        return str(RemoteAddress.parse(teacher)) if is_remote(teacher) else Path(teacher)

    @model_validator(mode="after")
    def _check_models(self) -> ServeConfig:
        if self.no_teacher and self.teacher is not None:
            raise ValueError("--teacher and --no-teacher contradict each other; give one of them")
        if self.no_teacher and self.no_student:
            raise ValueError("--no-teacher and --no-student leave no model; give one of them")
        if self.no_student and self.teacher_address is not None:
            raise ValueError(
                f"--no-student leaves no model here: --teacher {self.teacher} is elsewhere; give "
                "the teacher's folder"
            )
        if self.bundle is None and not (self.no_student and self.teacher is not None):
            raise ValueError(
                "bundle is required: --bundle, TANDEM_BUNDLE, or bundle in --config FILE "
                "(without one: --no-student and --teacher FOLDER)"
            )
        return self

    @model_validator(mode="after")
    def _check_teacher_access(self) -> ServeConfig:
        address = self.teacher_address
        is_encrypted = address is not None and address.is_encrypted
        for name in ("teacher_token_file", "teacher_tls_ca", "teacher_tls_cert", "teacher_tls_key"):
            flag = f"--{name.replace('_', '-')}"
            if getattr(self, name) is None:
                continue
            if address is None:
                raise ValueError(f"{flag} is for a --teacher grpc://HOST:PORT")
            is_safe = name == "teacher_token_file" and is_loopback(address.host)
            if not is_encrypted and not is_safe:
                raise ValueError(f"{flag} needs an encrypted --teacher grpcs://HOST:PORT")
        if (self.teacher_tls_cert is None) != (self.teacher_tls_key is None):
            raise ValueError(
                "--teacher-tls-cert and --teacher-tls-key belong together; give both or none"
            )
        return self

    @field_validator("answer_formats")
    @classmethod
    def _check_answer_formats(cls, formats: dict[str, str]) -> dict[str, str]:
        compile_formats(formats)
        return formats

    @model_validator(mode="after")
    def _check_tls(self) -> ServeConfig:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key belong together; give both or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
        return self

    @field_validator("host", "control_host", "metrics_host")
    @classmethod
    def _check_host(cls, host: str) -> str:
        return parse_host(host)

    @model_validator(mode="after")
    def _check_sockets(self) -> ServeConfig:
        """Refuse what no Unix socket has; ports that are defaults are nobody's wish."""
        if is_unix(self.metrics_host):
            raise ValueError(
                f"--metrics-host {self.metrics_host}: metrics are served over TCP alone; must be a "
                "name or an address"
            )
        if is_unix(self.host) and self.host == self.control_host:
            raise ValueError(f"--host and --control-host are both {self.host}; give them two")
        for name, host in (("port", self.host), ("control_port", self.control_host)):
            port, default = getattr(self, name), type(self).model_fields[name].default
            if is_unix(host) and port not in (0, default):
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} {port}: {host} has no port; leave it out")
        return self

    @model_validator(mode="after")
    def _check_hosts(self) -> ServeConfig:
        is_safe = self.tls_cert is not None and (self.tls_client_ca or self.auth_tokens)
        if is_safe or self.insecure_listen:
            return self
        for name, host in (("--host", self.host), ("--control-host", self.control_host)):
            if not is_loopback(host):
                raise ValueError(
                    f"{name} {host!r} is reachable from outside; that needs --tls-cert and "
                    "--tls-key with --auth-tokens or --tls-client-ca. Use 127.0.0.1, or say "
                    "--insecure-listen"
                )
        return self

    @model_validator(mode="after")
    def _check_policy(self) -> ServeConfig:
        if not self.student_weight and not self.teacher_weight:
            raise ValueError("--student-weight and --teacher-weight are both 0; one must be above")
        return self
