"""Synchronous streams that are begun again: the rules, and servers that are killed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import grpc
import pytest

from protos.tandem.v1 import inference_pb2 as pb
from serve.client import Client
from serve.client.channel import PAUSES_S, Attempts, RetryBudget, service_config

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


class Failed(grpc.RpcError):
    """A call that failed, perhaps with the server's wish."""

    def __init__(self, code: grpc.StatusCode, wish: str | None = None) -> None:
        self._code, self._wish = code, wish

    def code(self) -> grpc.StatusCode:
        return self._code

    def trailing_metadata(self) -> Any:
        return None if self._wish is None else (("grpc-retry-pushback-ms", self._wish),)


def attempts(max_attempts: int = 5, timeout_s: float | None = None) -> Attempts:
    return Attempts(max_attempts, RetryBudget(), timeout_s)


def test_pauses_are_those_that_grpc_makes_for_other_calls() -> None:
    given = attempts()
    pauses_s = [given.pause_s(Failed(UNAVAILABLE)) for _ in range(5)]
    for found, wanted in zip(pauses_s, PAUSES_S, strict=False):
        assert found == pytest.approx(wanted, rel=0.2)
    assert pauses_s[4] is None
    for word in ('"initialBackoff": "0.2s"', '"backoffMultiplier": 5', '"maxBackoff": "10s"'):
        assert word in service_config(5)


@pytest.mark.parametrize(
    ("max_attempts", "error", "expected_s"),
    [
        (1, Failed(UNAVAILABLE), None),
        (2, Failed(grpc.StatusCode.INTERNAL), None),
        (2, Failed(grpc.StatusCode.RESOURCE_EXHAUSTED, "1500"), 1.5),
        (2, Failed(UNAVAILABLE, "-1"), None),
        (2, Failed(UNAVAILABLE, "soon"), None),
        (2, Failed(UNAVAILABLE, "9" * 400), None),
        (2, Failed(UNAVAILABLE, "9" * 5000), None),
    ],
)
def test_server_and_status_decide(
    max_attempts: int, error: grpc.RpcError, expected_s: float | None
) -> None:
    assert attempts(max_attempts).pause_s(error) == expected_s


def test_pause_ends_with_the_deadline() -> None:
    given = attempts(timeout_s=0.05)
    pause_s = given.pause_s(Failed(UNAVAILABLE, "5000"))
    assert pause_s is not None and pause_s <= 0.05
    assert given.left_s is not None and attempts().left_s is None


def test_budget_of_half_is_used_up_and_comes_back() -> None:
    budget = RetryBudget(max_tokens=4)
    assert [budget.failed() for _ in range(3)] == [True, False, False]
    for _ in range(21):
        budget.succeeded()
    assert budget.failed()


SERVER = """
import grpc, sys, time
from concurrent.futures import ThreadPoolExecutor
def wait(request, context):
    print("asked", flush=True)
    time.sleep(60)
    yield b""
handler = grpc.method_handlers_generic_handler(
    "tandem.v1.InferenceService", {"Generate": grpc.unary_stream_rpc_method_handler(wait)})
server = grpc.server(ThreadPoolExecutor(4), handlers=[handler])
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
time.sleep(60)
"""


@pytest.fixture
def mute() -> Any:
    """A server process that takes a call and says nothing; its port."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.port = int(process.stdout.readline())  # type: ignore[attr-defined]
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_stream_whose_server_is_killed_ends_with_its_deadline(mute: Any) -> None:
    with Client(f"127.0.0.1:{mute.port}", timeout_s=4) as client:
        stream = client.generate(pb.GenerateRequest(prompt="x"))
        assert mute.stdout.readline() == "asked\n"
        mute.kill()
        with pytest.raises(grpc.RpcError) as caught:
            stream.result()
    assert caught.value.code() in (UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
