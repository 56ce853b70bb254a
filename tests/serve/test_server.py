"""Start, health, drain and end of a whole server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import ValidationError

from protos.tandem.v1 import inference_pb2 as pb
from serve.client import Client, ControlClient
from serve.config import ServeConfig
from serve.routing import Role
from serve.server import limits_of
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


def test_open_health_watch_does_not_hold_up_the_end(serving: Any, make_pair: Any) -> None:
    with serving(make_pair()) as live:
        stub = health_pb2_grpc.HealthStub(live.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="readiness"))
        assert next(watch).status == SERVING
        started_s = time.monotonic()
        live.stop_soon().result(30)
        assert time.monotonic() - started_s < 3
        assert next(watch).status == NOT_SERVING
        watch.cancel()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_dead_engine_takes_readiness_off_and_the_other_model_serves_on(
    serving: Any, make_pair: Any
) -> None:
    with serving(make_pair()) as live:
        watched = watch(live, "model.teacher")
        assert next(watched) == SERVING
        live.pair.backends[Role.TEACHER].error = SystemExit()
        with pytest.raises(grpc.RpcError):
            live.client.score(pb.ScoreRequest(prompt="x", completions=[{"text": "y"}]))
        started_s = time.monotonic()
        assert next(watched) == NOT_SERVING
        assert time.monotonic() - started_s < 1
        assert {health(live, name) for name in ("", "readiness", SERVICE_NAME)} == {NOT_SERVING}
        assert {health(live, name) for name in ("model.student", "liveness")} == {SERVING}
        divergence = pb.DivergenceOptions(enabled=False)
        events = live.client.generate(pb.GenerateRequest(prompt="x", divergence=divergence))
        assert any(event.HasField("complete") for event in events)
        watched.close()
        live.stop_soon().result(30)


def watch(live: Any, name: str) -> Generator[int, None, None]:
    """Yield a health status, and then each change of it."""
    stub = health_pb2_grpc.HealthStub(live.channel)
    call = stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=20)
    try:
        for reply in call:
            yield reply.status
    finally:
        call.cancel()


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
    config = ServeConfig(bundle="x", port=0, control_port=0, metrics_port=0, ready_file={ready!r})
    await serve_until_signal(pair.engines, config, pair.metrics)

asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["SIGTERM", "Drain"])
def test_server_drains_and_ends_with_exit_0(tmp_path: Path, how: str) -> None:
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
        if how == "Drain":
            with ControlClient(addresses["control_address"], timeout_s=30) as control:
                control.drain()
        else:
            process.send_signal(signal.SIGTERM)
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


def test_teacher_and_no_teacher_contradict_each_other() -> None:
    with pytest.raises(ValidationError, match="--no-teacher contradict"):
        ServeConfig(bundle="x", teacher="y", no_teacher=True)


def test_unknown_settings_are_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="max_seqs"):
        ServeConfig(bundle="x", max_seqs=3)
