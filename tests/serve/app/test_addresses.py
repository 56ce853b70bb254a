"""Unix sockets and IPv6: a server listens there, and whoever is told its address reaches it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bundle.errors import UserError
from loadtest.client.oip_target import OipTarget
from loadtest.client.targets import TandemTarget
from loadtest.config import RunConfig
from protos.tandem.v1 import inference_pb2 as pb
from serve.addresses import RemoteAddress
from serve.app.config import ServeConfig
from serve.app.listeners import check_listeners
from serve.app.process import write_ready_file
from serve.client import Client, ControlClient, Tls
from serve.client.channel import Endpoint
from tests.support.rpc.authorities import Pki

FREE = {"bundle": "x", "port": 0, "control_port": 0, "metrics_port": 0}


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def link_local() -> str | None:
    """Return an address of this machine that needs its zone; None where it has none."""
    path = Path("/proc/net/if_inet6")
    for line in path.read_text().splitlines() if path.exists() else ():
        digits, *_, scope, flags, name = line.split()
        is_tentative = int(flags, 16) & 0x40
        if scope == "20" and not is_tentative:
            return f"{':'.join(digits[i : i + 4] for i in range(0, 32, 4))}%{name}"
    return None


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
needs_zone = pytest.mark.skipif(link_local() is None, reason="no link-local IPv6 address here")
PLACES = [
    "unix:{folder}/a.sock",
    "unix://{folder}/a b-ä.sock",
    "unix-abstract:tandem-{pid}",
    pytest.param("::1", marks=needs_ipv6),
    pytest.param("[::1]", marks=needs_ipv6),
    pytest.param("::", marks=needs_ipv6),
    pytest.param(link_local(), marks=needs_zone),
]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A short one: pytest's may be too long for a socket."""
    short = Path(f"/tmp/tandem-{os.getpid()}")
    short.symlink_to(tmp_path)
    yield short
    short.unlink()


def place(text: str, folder: Path) -> str:
    return text.format(folder=folder, pid=os.getpid())


@pytest.mark.parametrize("text", PLACES)
def test_ready_file_names_targets_that_reach_the_server(
    serving: Any, make_pair: Any, loop: Any, folder: Path, tmp_path: Path, text: str
) -> None:
    """For every client: of Generate, of the control plane, of the metrics, of load tests."""
    host, ready_file = place(text, folder), tmp_path / "ready.json"
    control = f"unix:{folder}/control" if host.startswith("unix") else host
    metrics = "127.0.0.1" if host.startswith("unix") or "%" in host else host
    where = {"host": host, "control_host": control, "metrics_host": metrics}
    with serving(make_pair(), insecure_listen=True, **where) as live:
        write_ready_file(ready_file, live.server)
        ready = json.loads(ready_file.read_text())
        with Client(ready["address"], timeout_s=30, max_attempts=1) as client:
            sampling = pb.SamplingParams(max_tokens=2)
            request = pb.GenerateRequest(prompt="x", sampling=sampling)
            assert client.generate(request).result().samples
        with ControlClient(ready["control_address"], timeout_s=30, max_attempts=1) as client:
            assert client.status().engines
        with urllib.request.urlopen(ready["metrics_url"], timeout=10) as response:
            assert b"tandem_samples_total" in response.read()
        for kind in (TandemTarget, OipTarget):
            config = RunConfig(target=ready["address"], out=tmp_path / "run")
            asyncio.run_coroutine_threadsafe(check(kind, config), loop).result(30)


async def check(kind: Callable[..., Any], config: RunConfig) -> None:
    target = kind(config, {})
    await target.check()
    await target.close()


def test_socket_is_of_its_owner_and_group_and_gone_at_the_end(
    serving: Any, make_pair: Any, folder: Path
) -> None:
    paths = [folder / "data", folder / "control"]
    hosts = {"host": f"unix:{paths[0]}", "control_host": f"unix:{paths[1]}"}
    with serving(make_pair(), **hosts):
        assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [0o660, 0o660]
    assert not any(path.exists() for path in paths)


@pytest.fixture
def stale(folder: Path) -> Path:
    """The socket that a server has left which was killed."""
    path = folder / "stale.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    return path


def test_socket_of_a_killed_server_is_taken_over(serving: Any, make_pair: Any, stale: Path) -> None:
    check_listeners(ServeConfig(**FREE, host=f"unix:{stale}"))
    with socket.socket(socket.AF_UNIX) as again:
        again.bind(str(stale))
    with serving(make_pair(), host=f"unix:{stale}") as live:
        assert live.client.get_models().models


def test_socket_of_a_running_server_is_not(serving: Any, make_pair: Any, folder: Path) -> None:
    """gRPC by itself removes its file, and nobody reaches the first one any more."""
    host = f"unix:{folder}/a.sock"
    with serving(make_pair(), host=host) as live:
        with pytest.raises(UserError, match=r"a\.sock is in use: another server listens there"):
            check_listeners(ServeConfig(**FREE, host=host))
        with (
            pytest.raises(UserError, match=r"a\.sock is in use"),
            serving(make_pair(), host=host),
        ):
            pass
        assert live.client.get_models().models


def refusal(**settings: str) -> str:
    with pytest.raises(UserError) as caught:
        check_listeners(ServeConfig(**FREE, **settings))
    return str(caught.value)


def test_place_where_no_socket_can_be_is_named_by_its_flag(folder: Path) -> None:
    (folder / "file").write_text("")
    absent = f"unix:{folder}/absent/a.sock"
    assert refusal(host=absent) == f"--host {absent}: cannot listen: No such file or directory"
    below = f"unix:{folder}/file/a.sock"
    assert refusal(control_host=below).startswith(f"--control-host {below}: cannot listen: Not a")
    text = f"{folder}/file is there, and no socket; remove it, or listen elsewhere"
    assert refusal(host=f"unix:{folder}/file") == text
    assert (folder / "file").exists()


def test_taken_abstract_name_is_refused() -> None:
    name = f"tandem-taken-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind("\0" + name)
        text = f"--host unix-abstract:{name}: cannot listen: Address already in use"
        assert refusal(host=f"unix-abstract:{name}") == text


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"host": "unix:/a", "port": 7}, "--port 7: unix:/a has no port; leave it out"),
        ({"control_host": "unix:/a", "control_port": 7}, "--control-port 7: unix:/a has no port"),
        ({"host": "unix:/a", "control_host": "unix:///a"}, "--control-host are both unix:/a"),
        ({"metrics_host": "unix:/a"}, "--metrics-host unix:/a: metrics are served over TCP alone"),
        ({"host": "::"}, "--host '::' is reachable from outside"),
        ({"host": "fe80::1%eth0"}, "--host 'fe80::1%eth0' is reachable from outside"),
    ],
)
def test_socket_has_no_port_and_ipv6_is_not_all_of_this_machine(
    settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        ServeConfig(bundle="x", **settings)


def test_target_that_no_socket_can_be_is_refused_before_it_is_called() -> None:
    with pytest.raises(ValueError, match="has 200 bytes"):
        Endpoint("unix:/" + "x" * 199)
    with pytest.raises(ValueError, match="must be absolute"):
        Endpoint("unix://host/a.sock")
    with pytest.raises(ValueError, match=r"without .* commas"):
        Endpoint("unix:/a,/b")


def test_token_may_travel_over_a_socket() -> None:
    assert Endpoint("unix:/run/tandem.sock", token="secret").metadata()


@pytest.mark.parametrize("text", [PLACES[0], pytest.param("::1", marks=needs_ipv6)])
def test_remote_teacher_may_be_there(serving: Any, make_pair: Any, folder: Path, text: str) -> None:
    with serving(make_pair(), host=place(text, folder)) as live:
        address = live.server.address
        scheme = "grpc+" if address.startswith("unix") else "grpc://"
        remote = RemoteAddress.parse(scheme + address)
        assert str(remote) == scheme + address
        with Client(remote.target, timeout_s=30, max_attempts=1) as client:
            assert client.get_models().models


@pytest.mark.parametrize(("name", "server_name"), [("localhost", None), ("other", "other")])
def test_certificate_on_a_socket_is_that_of_localhost(
    serving: Any, make_pair: Any, folder: Path, name: str, server_name: str | None
) -> None:
    """Another one's name is to be given."""
    pki = Pki(folder, name)
    secured = {"tls_cert": pki.cert, "tls_key": pki.key}
    tls = Tls(ca=pki.client_ca, server_name=server_name)
    with (
        serving(make_pair(), host=f"unix:{folder}/a.sock", **secured) as live,
        Client(live.server.address, tls=tls, timeout_s=30, max_attempts=1) as client,
    ):
        assert client.get_models().models
