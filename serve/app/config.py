"""What a server is told at its start. Unknown keys and values out of bounds fail there, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serve.addresses import RemoteAddress, is_loopback, is_remote, is_unix, parse_host
from serve.pair.answers.formats import compile_formats

Backend = Literal["onnx", "torch"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["bfloat16", "float16", "float32"]


class ServeConfig(BaseModel):
    """The settings of `tandem serve`; its flags are named alike."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    bundle: Path | None = None
    """Folder of the bundle (default: none; required unless the teacher is alone)."""
    teacher: Path | str | None = None
    """Teacher's folder, or grpc://HOST:PORT, grpcs://HOST:PORT, grpc+unix:/PATH of a remote teacher
    (default: the folder that the bundle was made from)."""
    no_teacher: bool = False
    """Serve the student alone."""
    no_student: bool = False
    """Serve the teacher alone, for other servers."""
    variant: str | None = None
    """ONNX variant of the student (default: the bundle's)."""
    student_backend: Backend = "onnx"
    """Runtime of the student."""
    teacher_backend: Backend = "torch"
    """Runtime of the teacher."""
    teacher_dtype: Dtype = "bfloat16"
    """Type of the teacher's weights in torch."""
    device: Device = "auto"
    """Where the models run; auto is CUDA if present."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of one step (default: all that the process may use)."""

    teacher_timeout_s: float = Field(default=60.0, gt=0)
    """Limit of one scoring by the remote teacher, in seconds."""
    teacher_token_file: Path | None = None
    """File whose first line is the token for the remote teacher (default: no token)."""
    teacher_tls_ca: Path | None = None
    """PEM of the CA that signs the remote teacher's server (default: the CAs that gRPC trusts)."""
    teacher_tls_cert: Path | None = None
    """PEM chain that this server presents to the remote teacher (default: none)."""
    teacher_tls_key: Path | None = None
    """PEM key of teacher_tls_cert (default: none)."""

    host: str = "127.0.0.1"
    """Address for clients: a name, an IP address, or unix:/PATH."""
    port: int = Field(default=50051, ge=0, le=65535)
    """Port for clients; 0 picks a free one."""
    control_host: str = "127.0.0.1"
    """Address of the control plane: a name, an IP address, or unix:/PATH."""
    control_port: int = Field(default=50052, ge=0, le=65535)
    """Port of the control plane; 0 picks a free one."""
    metrics_host: str = "127.0.0.1"
    """Address of /metrics and /healthz: a name or an IP address."""
    metrics_port: int = Field(default=9464, ge=0, le=65535)
    """Port of /metrics and /healthz; 0 picks a free one."""
    insecure_listen: bool = False
    """Allow an address that other machines can reach without TLS and credentials."""
    reflection: bool = False
    """Let clients list services and messages: gRPC server reflection."""
    ready_file: Path | None = None
    """File to write as JSON, with the addresses, when the server accepts calls (default: none)."""

    tls_cert: Path | None = None
    """PEM chain of this server, read again when it changes (default: no TLS)."""
    tls_key: Path | None = None
    """PEM key of tls_cert, read again when it changes (default: no TLS)."""
    tls_client_ca: Path | None = None
    """PEM of the CA that signs clients (default: clients need no certificate)."""
    auth_tokens: Path | None = None
    """File of hashed tokens and their scopes (default: clients need no token)."""
    max_concurrent_per_peer: int = Field(default=256, ge=1)
    """Concurrent calls of one client."""

    max_num_seqs: int = Field(default=16, ge=1, le=1024)
    """Max concurrent sequences of each model."""
    max_num_seqs_per_client: int | None = Field(default=None, ge=1)
    """Max concurrent sequences of one client (default: all, until others wait)."""
    max_model_len: int = Field(default=2048, ge=2)
    """Prompt and completion together, in tokens."""
    max_waiting: int = Field(default=1024, ge=0)
    """Samples that may wait for each model."""
    max_pass_tokens: int | None = Field(default=None, ge=16)
    """Tokens of one prefill or scoring pass (default: chosen by the device)."""
    prefix_cache_mib: int = Field(default=256, ge=0)
    """Keys and values of earlier prompts, per model, in MiB; 0 keeps none."""
    max_step_s: float = Field(default=120.0, gt=0)
    """Limit of one step of a model, which counts as hung beyond it, in seconds."""

    max_prompt_bytes: int = Field(default=1 << 20, ge=1, le=3 << 20)
    """Size of a prompt, in bytes."""
    max_num_samples: int = Field(default=64, ge=1, le=64)
    """Samples of one request."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """Largest max_tokens of a request, in tokens (default: the context)."""
    max_timeout_s: float = Field(default=600.0, gt=0)
    """Longest deadline of a call, in seconds."""
    max_stall_s: float = Field(default=30.0, gt=0)
    """Time that a client may take to read a response, in seconds."""
    max_replays: int = Field(default=1024, ge=0)
    """Answers in the idempotency cache, for requests that come again with the same id."""
    max_replay_mib: int = Field(default=16, ge=0)
    """Memory of the idempotency cache, in MiB."""
    replay_ttl_s: float = Field(default=120.0, ge=0)
    """Time that an answer stays in the idempotency cache, in seconds."""

    student_weight: float = Field(default=1.0, ge=0, le=1e6)
    """Relative share of ROUTE_AUTO traffic that the student answers."""
    teacher_weight: float = Field(default=0.0, ge=0, le=1e6)
    """Relative share of ROUTE_AUTO traffic that the teacher answers."""
    shadow_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of the answers that get shadow scoring by the other model, 0 to 1."""
    max_shadows: int = Field(default=32, ge=0)
    """Shadow scorings that wait or run; further ones are dropped and counted."""
    shadow_timeout_s: float = Field(default=30.0, gt=0)
    """Time after which a shadow scoring is given up, in seconds."""

    tasks: frozenset[str] = frozenset()
    """Labels of task in metrics; others count as other."""
    answer_formats: dict[str, str] = Field(default_factory=dict)
    """Additional answer formats: name → regular expression whose group 1 is the answer."""
    symbolic_timeout_s: float = Field(default=2.0, gt=0)
    """Limit of one symbolic comparison of answers, in seconds."""
    log_requests: bool = False
    """Log one line per call, never prompts or answers."""

    drain_delay_s: float = Field(default=0.0, ge=0)
    """Time of serving on while not ready, at shutdown, in seconds."""
    drain_grace_s: float = Field(default=30.0, ge=0)
    """Time for running calls to finish after that, in seconds."""

    @property
    def teacher_address(self) -> RemoteAddress | None:
        """Where the remote teacher is; None for one that is loaded here, and for none."""
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
                f"--no-student leaves no model here: --teacher {self.teacher} is remote; give "
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
