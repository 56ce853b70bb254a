"""The very command of the distillation Job as two processes that stand for two pods.

One is killed and one terminated before the run comes to its end.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from bundle.verify import verify_bundle
from export.pipeline import open_pipeline
from export.run.recipe import load_config
from tests.deploy.distill_job import OVERLAY, action_on, container_of, pod_of, render
from tests.deploy.rendered import needs_kubectl
from tests.support.recipes import SMALL, RecordingReporter, write_recipe

pytestmark = [
    pytest.mark.nightly,
    needs_kubectl,
]

MAX_WAIT_S = 120
# A lost pod must end the others sooner; on the loopback the kernel tells at once.
MAX_LOSS_S = 30
MAX_END_S = 30
STUDENT = "distill-*[!l]"  # not the one that ends in .partial
PHASE = {
    "num_epochs": 8,
    "learning_rate": 1e-3,
    "tokens_per_step": 64,
    "tokens_per_micro_batch": 32,
}
SETTINGS: dict[str, Any] = {
    **SMALL,
    "tasks": {"max_train": 16, "max_test": 2},
    "distill": {"phases": [PHASE], "checkpoint_every_s": 0.001},
    "variants": {},
}


@pytest.fixture(scope="module")
def rendered() -> dict[tuple[str, str], Any]:
    return render(OVERLAY)


@pytest.fixture(scope="module")
def job(rendered: Mapping[tuple[str, str], Any]) -> Any:
    return rendered["Job", "tandem-distill"]


@dataclass(frozen=True, slots=True)
class Cluster:
    """Starts the Job's command on this machine, once per index."""

    rendered: Mapping[tuple[str, str], Any]
    job: Any
    recipe: Path
    stack: ExitStack

    def start(self) -> list[subprocess.Popen[str]]:
        """Start both pods, on a port of their own."""
        port = free_port()
        return [self._start_pod(index, port) for index in range(self.job["spec"]["completions"])]

    @property
    def work(self) -> Path:
        return self.recipe.parent / "run" / "work"

    @property
    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.recipe.parent.glob("*.log")))

    def wait_until(self, is_time: Callable[[], bool], pods: list[subprocess.Popen[str]]) -> None:
        deadline_s = time.monotonic() + MAX_WAIT_S
        while not is_time():
            assert [pod.poll() for pod in pods] == [None, None], self.logs
            assert time.monotonic() < deadline_s, self.logs
            time.sleep(0.005)

    def _start_pod(self, index: int, port: int) -> subprocess.Popen[str]:
        container = container_of(self.job)
        environment = self._environment(container, index)
        words = [*container["command"], *container["args"]]
        words = [self._local(expand(word, environment), port) for word in words]
        assert words[0] == "python"
        with (self.recipe.parent / f"pod-{index}.log").open("a") as log:
            pod = subprocess.Popen(
                [sys.executable, *words[1:]], env=os.environ | environment,
                stdout=log, stderr=log, text=True,
            )  # fmt: skip
        self.stack.callback(pod.wait)
        self.stack.callback(kill, pod)
        return pod

    def _environment(self, container: Any, index: int) -> dict[str, str]:
        return {each["name"]: self._value(each, index) for each in container["env"]} | {
            # One thread, as the run to compare with; cores are few here.
            "OMP_NUM_THREADS": "1"
        }

    def _value(self, variable: Any, index: int) -> str:
        if "value" in variable:
            return str(variable["value"])
        ((kind, source),) = variable["valueFrom"].items()
        if kind == "configMapKeyRef":
            return str(self.rendered["ConfigMap", source["name"]]["data"][source["key"]])
        if kind == "resourceFieldRef":
            return str(container_of(self.job)["resources"]["limits"]["cpu"])
        return {
            "metadata.annotations['batch.kubernetes.io/job-completion-index']": str(index),
            "metadata.labels['batch.kubernetes.io/job-name']": self.job["metadata"]["name"],
        }[source["fieldPath"]]

    def _local(self, word: str, port: int) -> str:
        """Put this machine in place of the pods' network and volumes."""
        name = f"{self.job['metadata']['name']}-0.{pod_of(self.job)['subdomain']}"
        replaced = {
            f"--main_process_ip={name}": "--main_process_ip=127.0.0.1",
            "--main_process_port=29500": f"--main_process_port={port}",
            "/recipe/recipe.yaml": str(self.recipe),
        }
        return replaced.get(word, word)


def expand(word: str, environment: Mapping[str, str]) -> str:
    """Expand $(NAME) as the kubelet does."""
    return re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], word)


def free_port() -> int:
    """Return a port that is free, as the next one is, which is the launchers'."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def kill(pod: subprocess.Popen[str]) -> None:
    """End all processes of a pod at once, as the end of its container does.

    torch's launcher gives its processes sessions of their own, so there is no group to kill.
    """
    if pod.poll() is None:
        root = psutil.Process(pod.pid)
        for process in (root, *root.children(recursive=True)):
            process.kill()


def recipe_in(folder: Path, teacher: Path) -> Path:
    paths = {"output_dir": folder / "run", "cache_dir": folder / "cache"}
    return write_recipe(folder / "recipe.yaml", SETTINGS, teacher=teacher, **paths)


@pytest.fixture(scope="module")
def cluster(
    rendered: Mapping[tuple[str, str], Any],
    job: Any,
    tiny_teacher: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cluster]:
    recipe = recipe_in(tmp_path_factory.mktemp("pods"), tiny_teacher)
    with ExitStack() as stack:
        yield Cluster(rendered, job, recipe, stack)


def checkpoints(cluster: Cluster) -> list[str]:
    return [path.name for path in sorted(cluster.work.glob("distill-*.partial/checkpoints/*-0*"))]


@pytest.fixture(scope="module")
def killed(cluster: Cluster) -> list[int]:
    """Exit codes after pod 1 was killed with a checkpoint written."""
    pods = cluster.start()
    cluster.wait_until(lambda: bool(checkpoints(cluster)), pods)
    kill(pods[1])
    return [pod.wait(MAX_LOSS_S) for pod in pods]


@pytest.fixture(scope="module")
def terminated(cluster: Cluster, killed: list[int]) -> list[int]:
    """Exit codes after both were started again and pod 0 got SIGTERM further on."""
    found = checkpoints(cluster)
    pods = cluster.start()
    cluster.wait_until(lambda: checkpoints(cluster) > found, pods)
    pods[0].terminate()
    return [pod.wait(MAX_LOSS_S) for pod in pods]


@pytest.fixture(scope="module")
def trained(cluster: Cluster, terminated: list[int]) -> list[subprocess.Popen[str]]:
    """Pods that were started for the third time and have trained the student by now."""
    pods = cluster.start()
    cluster.wait_until(lambda: any(map(Path.is_dir, cluster.work.glob(STUDENT))), pods)
    return pods


def test_killed_pod_ends_the_other_one_which_is_to_start_again(
    cluster: Cluster, job: Any, killed: list[int]
) -> None:
    assert killed == [5, -signal.SIGKILL], cluster.logs
    assert action_on(job, killed[0]) == "Ignore"
    assert "launch: machine 1 is gone: this machine ends too" in cluster.logs


def test_terminated_pod_ends_the_other_one_and_both_are_to_start_again(
    cluster: Cluster, terminated: list[int]
) -> None:
    assert terminated == [5, 5], cluster.logs
    assert "tandem: interrupted; everything finished is kept" in cluster.logs


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """As the pods have: the cores are theirs as well."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.usefixtures("_one_thread")
def test_started_again_they_train_the_student_of_one_process(
    cluster: Cluster, trained: list[subprocess.Popen[str]], tiny_teacher: Path, tmp_path: Path
) -> None:
    """The tolerance is that of tests/export/run/test_processes.py."""
    pipeline = open_pipeline(load_config(recipe_in(tmp_path, tiny_teacher)), RecordingReporter())
    alone = load_file(pipeline.run(pipeline.distilled).path / "model.safetensors")
    (student,) = cluster.work.glob(STUDENT)
    together = load_file(student / "model.safetensors")
    assert alone.keys() == together.keys()
    for name, value in together.items():
        assert (value - alone[name]).norm() <= 1e-3 * alone[name].norm(), name
    assert cluster.logs.count("sample …") == 1, "a finished stage was run again"


def test_they_write_the_bundle_and_end_with_0(
    cluster: Cluster, trained: list[subprocess.Popen[str]]
) -> None:
    cluster.wait_until(lambda: any(cluster.work.glob("evaluate-*[!l]")), trained)
    assert [pod.wait(MAX_END_S) for pod in trained] == [0, 0], cluster.logs
    verify_bundle(cluster.work.parent / "bundle")
