import json
import subprocess
import sys
from pathlib import Path

import pytest

from serve.client.channel import CHANNEL_OPTIONS, Endpoint, Tls, service_config


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
    assert json.loads(service_config(3))["methodConfig"][0]["retryPolicy"]["maxAttempts"] == 3


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
