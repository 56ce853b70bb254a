"""How a client connects, and when it tries again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.tandem.v1 import inference_pb2 as pb
from serve.client import Client
from serve.client.channel import (
    CHANNEL_OPTIONS,
    PAUSES_S,
    Attempts,
    Endpoint,
    RetryBudget,
    Tls,
    service_config,
)

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def test_certificate_without_its_key_is_refused() -> None:
    with pytest.raises(ValueError, match="give both"):
        Tls(cert=Path("cert.pem"))


def test_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.pem"):
        Endpoint("127.0.0.1:1", tls=Tls(ca=Path("absent.pem"))).open()


@pytest.mark.parametrize("max_attempts", [0, 6])
def test_attempts_are_bounded(max_attempts: int) -> None:
    with pytest.raises(ValueError, match="must be 1 to 5"):
        Endpoint("127.0.0.1:1", max_attempts=max_attempts)


@pytest.mark.parametrize("token", ["", "a b", "secret\n", "schlüssel"])
def test_token_that_no_header_can_hold_is_refused_unshown(token: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII") as caught:
        Endpoint("127.0.0.1:1", token=token)
    assert not token or token not in str(caught.value)


@pytest.mark.parametrize("target", ["10.0.0.1:1", "dns:///tandem:1", "0.0.0.0:1", "localhost.x:1"])
def test_token_needs_tls_beyond_this_machine(target: str) -> None:
    with pytest.raises(ValueError, match="in clear"):
        Endpoint(target, token="secret")
    assert "secret" not in repr(Endpoint(target, token="secret", tls=Tls()))


def test_one_attempt_needs_no_retry_policy() -> None:
    assert json.loads(service_config(1)) == {"loadBalancingConfig": [{"round_robin": {}}]}
    (method,) = json.loads(service_config(3))["methodConfig"]
    assert method["retryPolicy"]["maxAttempts"] == 3
    # Of the control plane what reads alone: what changes is sent once.
    control = "tandem.v1.ControlService"
    assert [name.get("method") for name in method["name"] if name["service"] == control] == [
        "GetStatus",
        "GetPolicy",
    ]


def test_last_attempt_is_later_than_a_restart_of_ten_seconds() -> None:
    policy = json.loads(service_config(5))["methodConfig"][0]["retryPolicy"]
    pause_s, max_s = (float(policy[key][:-1]) for key in ("initialBackoff", "maxBackoff"))
    pauses_s = [min(pause_s * policy["backoffMultiplier"] ** n, max_s) for n in range(4)]
    reconnect_s = 1.2 * dict(CHANNEL_OPTIONS)["grpc.max_reconnect_backoff_ms"] / 1e3
    assert 0.8 * sum(pauses_s) - reconnect_s > 10


LOOPS = """
import asyncio, threading
from serve.client.channel import Endpoint

async def open_and_close():
    await Endpoint("127.0.0.1:1").open_async().close()
    return {t.ident for t in threading.enumerate() if "_poll_wrapper" in t.name}

first, second = asyncio.run(open_and_close()), asyncio.run(open_and_close())
assert first == second and len(first) == 1, (first, second)
"""


def test_grpc_aio_is_not_taken_down_between_event_loops() -> None:
    """In a process of its own: here other tests keep it alive."""
    subprocess.run([sys.executable, "-c", LOOPS], check=True, timeout=60)


# Synchronous streams that are begun again


class Failed(grpc.RpcError):
    """A call that failed, perhaps with the server's wish."""

    def __init__(self, code: grpc.StatusCode, wish: str | None = None) -> None:
        self._code, self._wish = code, wish

    def code(self) -> grpc.StatusCode:
        return self._code

    def trailing_metadata(self) -> Any:
        return None if self._wish is None else (("grpc-retry-pushback-ms", self._wish),)


def attempts_of(max_attempts: int = 5, timeout_s: float | None = None) -> Attempts:
    return Attempts(max_attempts, RetryBudget(), timeout_s)


def test_pauses_are_those_that_grpc_makes_for_other_calls() -> None:
    given = attempts_of()
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
    assert attempts_of(max_attempts).pause_s(error) == expected_s


def test_pause_ends_with_the_deadline() -> None:
    given = attempts_of(timeout_s=0.05)
    pause_s = given.pause_s(Failed(UNAVAILABLE, "5000"))
    assert pause_s is not None and pause_s <= 0.05
    assert given.left_s is not None and attempts_of().left_s is None


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
