"""Start, health, drain and end of a whole server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from bundle.errors import UserError
from bundle.manifest import (
    Evaluation,
    Gate,
    Manifest,
    StudentInfo,
    TeacherReference,
    Variant,
    write_manifest,
)
from bundle.verify import list_entries
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import Client
from serve.config import ServeConfig
from serve.metrics import ServerMetrics
from serve.routing import Role
from serve.server import build_engines, limits_of, read_eos_token_ids
from serve.service import SERVICE_NAME

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NAMES = ("", "readiness", SERVICE_NAME, "model.student", "model.teacher")


def health(live: Any, name: str) -> int:
    stub = health_pb2_grpc.HealthStub(live.channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status)


def test_every_health_name_is_serving(live: Any) -> None:
    assert {health(live, name) for name in (*NAMES, "liveness")} == {SERVING}


def test_addresses_are_loopback_with_the_ports_picked(live: Any) -> None:
    assert live.server.address.startswith("127.0.0.1:")
    assert not live.server.address.endswith(":0")
    with urllib.request.urlopen(live.server.metrics_url, timeout=10) as reply:
        assert b"tandem_requests_total" in reply.read()


def test_drain_refuses_new_work_and_finishes_the_old(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(max_model_len=4000)) as live:
        sampling = pb.SamplingParams(max_tokens=800, ignore_eos=True)
        stream = live.client.generate(pb.GenerateRequest(prompt="x", sampling=sampling))
        next(stream)
        live.pair.backends[Role.STUDENT].may_run.clear()
        stopping = live.stop_soon()
        with pytest.raises(grpc.RpcError) as caught:
            while True:
                live.client.compare(pb.CompareRequest(prompt="x"))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
        assert {health(live, name) for name in NAMES} == {NOT_SERVING}
        assert health(live, "liveness") == SERVING
        assert live.pair.value("draining") == 1
        live.pair.backends[Role.STUDENT].may_run.set()
        sample = next(e.complete.sample for e in stream if e.HasField("complete"))
        stopping.result(30)
    assert (sample.finish_reason, len(sample.token_ids)) == (pb.FINISH_REASON_LENGTH, 800)


def test_what_outlasts_the_grace_ends_with_shutdown(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(max_model_len=100_000), drain_grace_s=0) as live:
        sampling = pb.SamplingParams(max_tokens=90_000, ignore_eos=True)
        stream = live.client.generate(pb.GenerateRequest(prompt="x", sampling=sampling))
        next(stream)
        stopping = live.stop_soon()
        events = list(stream)
        stopping.result(30)
    sample = next(e.complete.sample for e in events if e.HasField("complete"))
    assert sample.finish_reason == pb.FINISH_REASON_SHUTDOWN
    assert sample.token_ids
    # Whether the teacher still scored it depends on which engine stopped first.
    assert sample.HasField("divergence") != bool(sample.divergence_error)
    assert events[-1].HasField("usage")


def test_limits_are_the_lesser_models(make_pair: Any) -> None:
    engines = make_pair(max_model_len=77).engines
    limits = limits_of(engines, ServeConfig(bundle="x", tasks=frozenset({"a"})))
    assert (limits.max_model_len, limits.vocab_size, limits.tasks) == (77, 259, {"a"})


SERVE_UNTIL_SIGNAL = """
import asyncio, sys
sys.path[:0] = [{root!r}, {tests!r}]
from conftest import Pair
from serve.config import ServeConfig
from serve.server import serve_until_signal

async def main():
    pair = Pair()
    config = ServeConfig(bundle="x", port=0, metrics_port=0, ready_file={ready!r})
    await serve_until_signal(pair.engines, config, pair.metrics)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_signal_ends_the_server_with_exit_0(tmp_path: Path, number: signal.Signals) -> None:
    ready = tmp_path / "ready.json"
    script = SERVE_UNTIL_SIGNAL.format(
        root=str(Path(__file__).parents[2]), tests=str(Path(__file__).parent), ready=str(ready)
    )
    process = subprocess.Popen([sys.executable, "-W", "error", "-c", script])
    try:
        addresses = read_when_written(ready, process)
        assert addresses["metrics_url"].startswith("http://127.0.0.1:")
        with Client(addresses["address"], timeout_s=30) as client:
            assert len(client.get_models().models) == 2
        process.send_signal(number)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def read_when_written(path: Path, process: subprocess.Popen[bytes]) -> dict[str, str]:
    while not path.exists():
        assert process.poll() is None, "the server ended before it was ready"
        threading.Event().wait(0.02)
    addresses: dict[str, str] = json.loads(path.read_text())
    return addresses


def test_listening_to_the_world_needs_a_flag() -> None:
    with pytest.raises(ValidationError, match="--insecure-listen"):
        ServeConfig(bundle="x", host="0.0.0.0")
    assert ServeConfig(bundle="x", host="0.0.0.0", insecure_listen=True).host == "0.0.0.0"


def test_unknown_settings_are_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="max_seqs"):
        ServeConfig(bundle="x", max_seqs=3)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": 2}, {2}),
        ({"generation_config.json": [2, 5], "config.json": 1}, {2, 5}),
        ({"generation_config.json": None, "config.json": 1}, {1}),
    ],
)
def test_eos_comes_from_the_generation_config_first(
    tmp_path: Path, files: dict[str, Any], expected: set[int]
) -> None:
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
    assert read_eos_token_ids(tmp_path) == expected


def test_model_without_an_eos_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="eos_token_id"):
        read_eos_token_ids(tmp_path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A bundle with a tiny random Llama as its student; its ONNX graph is none."""
    folder = tmp_path_factory.mktemp("bundle")
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "student")
    tokenizer._tokenizer.save(str(folder / "student" / "tokenizer.json"))
    (folder / "onnx" / "int8").mkdir(parents=True)
    (folder / "onnx" / "int8" / "model.onnx").write_text("not a graph")
    write_manifest(folder, manifest_of(folder))
    return folder


def manifest_of(folder: Path) -> Manifest:
    gate = Gate(name="kl", measured=0.0, threshold=1.0, passed=True, unit="nats/token")
    return Manifest(
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        tandem_version="0",
        files=list_entries(folder),
        tokenizer_sha256="0" * 64,
        chat_template_sha256="0" * 64,
        teacher=TeacherReference(
            source="x", weights_sha256="0" * 64, architecture="x", num_parameters=1, dtype="x"
        ),
        student=StudentInfo(num_parameters=1, num_layers=1, kept_layers=(0,), dtype="float32"),
        lineage=(),
        variants={
            "int8": Variant(
                precision="int8", opset=21, inputs=(), outputs=(), size_bytes=1, num_nodes=1,
                gates=(gate,),
            )
        },
        default_variant="int8",
        metrics=Evaluation(num_prompts=0, num_samples=1, k=(), temperature=0, seed=0, values={}),
    )  # fmt: skip


def load(bundle: Path, **settings: Any) -> Any:
    settings = {"student_backend": "torch", "max_model_len": 64, "device": "cpu", **settings}
    metrics = ServerMetrics(CollectorRegistry())
    return build_engines(ServeConfig(bundle=bundle, **settings), metrics)


def test_bundle_and_teacher_become_two_engines(bundle: Path) -> None:
    engines = load(bundle, teacher=bundle / "student", teacher_dtype="float32", max_num_seqs=2)
    student, teacher = engines.loaded
    assert (student.role, teacher.role) == (Role.STUDENT, Role.TEACHER)
    assert student.engine.info.max_num_seqs == 2
    assert student.manifest_sha256 and not teacher.manifest_sha256
    assert teacher.tokenizer is student.tokenizer


def test_without_a_teacher_the_student_is_alone(bundle: Path) -> None:
    assert load(bundle).teacher is None


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"student_backend": "onnx", "variant": "int2"}, "variant 'int2' is none of int8"),
        ({"max_model_len": 4096}, "max_model_len 4096 exceeds the 128"),
        ({"bundle": Path("/nowhere")}, "is not a bundle"),
    ],
)
def test_what_cannot_be_served_is_a_user_error(
    bundle: Path, settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=text):
        load(**{"bundle": bundle, **settings})
