"""The pods of the overlay `split`, run as processes: their settings, probes, and the way between.

Arguments, environment, ConfigMap and probes are those of the manifests. Exchanged is what a cluster
would bring: the paths of volumes, the address of a Service, ports.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from protos.tandem.v1 import inference_pb2 as pb
from serve.client import Client, Tls
from serve.rpc.credentials.tokens import new_token
from tests.deploy import objects
from tests.deploy.objects import Object, Rendered, component_of, container_of
from tests.deploy.rendered import KUBECTL, ROOT, needs_kubectl
from tests.support.polling import wait_until
from tests.support.tiny_bundle import shared_tiny_bundle

pytestmark = needs_kubectl
TEACHER = "tandem-teacher-headless:50051"
PATIENCE_S = 40.0
# What the tiny bundle needs, and a drain that is long enough to be seen.
SAMPLING = pb.SamplingParams(max_tokens=4, seed=1)
FLAGS = ("--student-backend=torch", "--threads=1", "--max-model-len=128", "--drain-delay-s=1")


@dataclass(frozen=True, slots=True)
class Pod:
    """A process that was told what a pod is told."""

    container: Object
    process: subprocess.Popen[bytes]
    ready_file: Path

    def wait_ready(self) -> Mapping[str, str]:
        """Return its addresses when it answers."""
        wait_until(lambda: self.ready_file.exists() or self.process.poll() is not None)
        ready: Mapping[str, str] = json.loads(self.ready_file.read_text(encoding="utf-8"))
        return ready

    def passes(self, kind: str, ready: Mapping[str, str]) -> bool:
        """Do as a kubelet does, at the address where the probe's port is."""
        probe = self.container[kind]
        if "grpc" in probe:
            return is_serving(ready["address"], probe["grpc"]["service"])
        return is_ok(ready["metrics_url"].removesuffix("/metrics") + probe["httpGet"]["path"])


def is_serving(address: str, service: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=3)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def is_ok(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=3) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError:
        return False


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """What stands in the manifests, and what it is here; the Secrets are filled."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    fill_secrets(secrets)
    return {
        TEACHER: f"127.0.0.1:{port}",
        "/bundle": str(shared_tiny_bundle()),
        "/teacher": str(shared_tiny_bundle().parent / "teacher"),
        "/tls": str(secrets),
        "/tokens": str(secrets),
        "/tmp": str(tmp_path),
    }


def fill_secrets(folder: Path) -> None:
    """Write what docs/kubernetes.md says of the Secrets tandem-tls and tandem-tokens."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.crt")
    issued.private_key_pem.write_to_path(folder / "tls.key")
    issued.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    token, sha256 = new_token()
    (folder / "teacher-token").write_text(token, encoding="utf-8")
    (folder / "tokens").write_text(f"student {sha256} inference\n", encoding="utf-8")


def here(value: Any, places: Mapping[str, str]) -> Any:
    """Return a setting with what a cluster would bring exchanged."""
    if not isinstance(value, str):
        return value
    for place, path in places.items():
        if value == place or value.startswith(f"{place}/"):
            return path + value.removeprefix(place)
    return value.replace(TEACHER, places[TEACHER])


@pytest.fixture
def start(tmp_path: Path, places: dict[str, str]) -> Iterator[Callable[[Rendered, str], Pod]]:
    """`start(rendered, "student")`: the pod of a component, begun to start."""
    with ExitStack() as stack:

        def begin(rendered: Rendered, component: str) -> Pod:
            (server,) = (s for s in rendered.servers() if component_of(s) == component)
            folder = tmp_path / component
            folder.mkdir()
            return start_pod(rendered, server, folder, places, stack)

        yield begin


def start_pod(
    rendered: Rendered, server: Object, folder: Path, places: Mapping[str, str], stack: ExitStack
) -> Pod:
    text, given = rendered.settings_of(server)
    config = {name: here(value, places) for name, value in yaml.safe_load(text).items()}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    environ = {name: here(value, places) for name, value in given.items()}
    ready_file = folder / "ready.json"
    is_teacher = component_of(server) == "teacher"
    port = places[TEACHER].partition(":")[2] if is_teacher else "0"
    flags = (
        *(f"--config={folder / 'serve.yaml'}", f"--ready-file={ready_file}", f"--port={port}"),
        *("--control-port=0", "--metrics-port=0", "--host=127.0.0.1", "--metrics-host=127.0.0.1"),
        *FLAGS,
    )
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-m", "tandem", container_of(server)["args"][0], *flags],
            cwd=ROOT,
            env={**os.environ, **environ},
        )
    )
    stack.callback(process.kill)
    return Pod(container_of(server), process, ready_file)


PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def test_student_pod_is_ready_without_its_teacher_and_drains(
    tmp_path: Path, start: Callable[[Rendered, str], Pod]
) -> None:
    student = start(objects.load(Path(KUBECTL), "split", tmp_path), "student")
    ready = student.wait_ready()
    assert [student.passes(kind, ready) for kind in PROBES] == [True, True, True]
    with Client(ready["address"]) as client:
        request = pb.GenerateRequest(prompt="The sea is", sampling=SAMPLING)
        assert list(client.generate(request))

    student.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not student.passes("readinessProbe", ready))
    assert student.process.poll() is None  # still serving, for the drain's delay
    assert student.process.wait(PATIENCE_S) == 0


def test_pods_with_tls_pass_their_probes_and_reach_each_other(
    tmp_path: Path, places: dict[str, str], start: Callable[[Rendered, str], Pod]
) -> None:
    rendered = objects.load(Path(KUBECTL), "split-tls", tmp_path)
    teacher, student = start(rendered, "teacher"), start(rendered, "student")
    for pod in (teacher, student):
        ready = pod.wait_ready()
        assert [pod.passes(kind, ready) for kind in PROBES] == [True, True, True]
    secrets = Path(places["/tls"])
    token, tls = (secrets / "teacher-token").read_text(), Tls(ca=secrets / "ca.crt")
    with Client(ready["address"], token=token, tls=tls) as client:
        wait_until(lambda: compare(client).samples[0].HasField("divergence"))
        roles = [sample.role for sample in compare(client).samples]
    assert roles == [pb.ROLE_STUDENT, pb.ROLE_TEACHER]


def compare(client: Client) -> pb.CompareResponse:
    return client.compare(pb.CompareRequest(prompt="The sea is", sampling=SAMPLING))
