from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from bundle.errors import UserError
from loadtest.client.process import LoadResult, Progress, open_target
from loadtest.client.requests_file import part_files
from loadtest.client.targets import Credentials
from loadtest.client.workers import INTERRUPTED, ClientFailedError, partition, run_load
from loadtest.config import RunConfig
from loadtest.records import DatasetPrompt, Phase
from loadtest.workload.schedule import Block, plan
from protos.tandem.v1 import inference_pb2 as pb
from protos.tandem.v1 import inference_pb2_grpc
from tests.support.load_tests import planned
from tests.support.rpc.listening import listening

PROMPTS = {"p": DatasetPrompt("p", "?")}


class Prompted(inference_pb2_grpc.InferenceServiceServicer):
    """Answers at once; has a student only. Notes by seed when a request came and was answered."""

    def __init__(self) -> None:
        self.came_s: dict[int, float] = {}
        self.answered_s: dict[int, float] = {}

    def Generate(self, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        seed = request.sampling.seed
        self.came_s[seed] = time.monotonic()
        yield pb.GenerateResponse(tokens=pb.TokenChunk(token_ids=[5]))
        self.answered_s[seed] = time.monotonic()
        yield pb.GenerateResponse(complete=pb.Complete(sample=pb.Sample(token_ids=[5])))
        yield pb.GenerateResponse(usage=pb.Usage())

    def GetModels(self, request: Any, context: Any) -> pb.GetModelsResponse:  # noqa: N802
        return pb.GetModelsResponse(models=[pb.Model(role=pb.ROLE_STUDENT)])


@pytest.fixture(scope="module")
def service() -> Prompted:
    return Prompted()


@pytest.fixture(scope="module")
def target(service: Prompted) -> Iterator[str]:
    with listening(service) as target:
        yield target


def config_of(target: str, **settings: Any) -> RunConfig:
    given = {"arms": ("student",), "arrival": "constant", "warmup_s": 0, "gap_s": 0.1, **settings}
    return RunConfig(target=target, out=Path("unused"), **given)


def load(
    config: RunConfig, on_progress: Callable[[Progress], None], folder: Path | None = None
) -> LoadResult:
    blocks = plan(config, list(PROMPTS.values())).blocks
    return run_load(config, PROMPTS, blocks, on_progress, folder=folder)


def test_processes_share_requests_and_clock(target: str, service: Prompted) -> None:
    config = config_of(target, processes=2, rates_rps=(40.0,), duration_s=0.8, block_s=0.4)
    seen: list[Progress] = []
    result = load(config, seen.append)
    assert [record.plan.number for record in result.records] == list(range(32))
    assert {record.status for record in result.records} == {"OK"}
    assert all(record.send_lag_s >= 0 for record in result.records)
    # One start fits all: nothing came before it was sent, nothing ended before it was answered.
    seeds = [(record, record.plan.seed) for record in result.records]
    latest_start_s = min(service.came_s[seed] - record.sent_s for record, seed in seeds)
    assert latest_start_s >= max(service.answered_s[seed] - r.ended_s for r, seed in seeds)
    assert [(cost.block, cost.process) for cost in result.costs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(cost.cpu_share > 0 for cost in result.costs)
    assert (seen[-1].num_sent, seen[-1].num_ended, seen[-1].num_failed) == (32, 32, 0)
    assert seen[-1].elapsed_s > 0.8
    assert not result.is_interrupted


def test_ctrl_c_keeps_what_was_recorded(target: str) -> None:
    before = signal.getsignal(signal.SIGINT)

    def interrupt(progress: Progress) -> None:
        if progress.num_ended >= 5 and signal.getsignal(signal.SIGINT) is not before:
            signal.raise_signal(signal.SIGINT)

    result = load(config_of(target, rates_rps=(20.0,), duration_s=60), interrupt)
    assert result.is_interrupted and result.problems == (INTERRUPTED,)
    assert 5 <= len(result.records) < 1200  # of 60 s
    assert result.records[0].is_ok
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_does_not_wait(target: str) -> None:
    def interrupt(progress: Progress) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        load(config_of(target, duration_s=60), interrupt)
    assert not multiprocessing.active_children()


def test_process_that_dies_ends_the_run_and_leaves_its_records(target: str, tmp_path: Path) -> None:
    def kill(progress: Progress) -> None:
        if any(b'"block":2,' in part.read_bytes() for part in part_files(tmp_path)):
            first, *others = multiprocessing.active_children()
            if others:
                first.kill()

    settings = {"rates_rps": (20.0,), "duration_s": 600, "block_s": 0.2}
    result = load(config_of(target, processes=2, **settings), kill, tmp_path)
    (problem,) = result.problems
    assert problem.endswith(
        "ended with exit code -9 before its requests did: a part of the load is missing"
    )
    assert {r.plan.number % 2 for r in result.records if r.plan.block == 0} == {0, 1}
    assert {record.status for record in result.records} <= {"OK", "CANCELLED"}
    assert not multiprocessing.active_children()


def test_process_that_dies_before_the_start_is_an_error(target: str) -> None:
    config = config_of(target, arms=("student",))
    with (
        patch("loadtest.client.workers.main", os._exit),
        pytest.raises(ClientFailedError, match="client process 0 ended with exit code"),
    ):
        load(config, lambda progress: None)


def test_childs_complaint_is_the_runs(target: str) -> None:
    with pytest.raises(UserError, match="does not serve teacher; it has student"):
        load(config_of(target, arms=("student", "teacher")), lambda progress: None)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("protocol", ["tandem", "oip"])
def test_unusable_credentials_are_the_users_error(protocol: str) -> None:
    config = config_of("example.com:1", protocol=protocol)
    with pytest.raises(UserError, match=r"--target example.com:1: the token would travel"):
        open_target(config, PROMPTS, Credentials(token="secret"))


def closed_block(num_requests: int, load: float) -> Block:
    closed = {"rate_rps": None, "concurrency": int(load), "intended_s": None}
    requests = tuple(planned(number, **closed) for number in range(num_requests))
    return Block(0, load, "student", 0.0, 1.0, Phase.MEASURED, requests)


def test_workers_of_a_closed_loop_are_shared_out() -> None:
    parts = [partition([closed_block(7, 5)], process, 3)[0] for process in range(3)]
    assert [part.load for part in parts] == [2, 2, 1]
    assert [[r.number for r in part.requests] for part in parts] == [[0, 3, 6], [1, 4], [2, 5]]
