"""The rules of the distillation Job as it is rendered."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from export.run.recipe import load_config
from tests.deploy.distill_job import (
    OVERLAY,
    action_on,
    container_of,
    generated,
    pod_of,
    render,
)
from tests.deploy.rendered import needs_kubectl

pytestmark = needs_kubectl


@pytest.fixture(scope="module")
def rendered() -> dict[tuple[str, str], Any]:
    return render(OVERLAY)


@pytest.fixture(scope="module")
def job(rendered: Mapping[tuple[str, str], Any]) -> Any:
    return rendered["Job", "tandem-distill"]


@pytest.mark.parametrize(
    ("exit_code", "action"),
    [(1, "Count"), (2, "FailJob"), (3, "FailJob"), (4, "FailJob"), (5, "Ignore"), (137, "Count")],
)
def test_exit_code_decides_whether_a_pod_starts_again(
    job: Any, exit_code: int, action: str
) -> None:
    assert action_on(job, exit_code) == action


def test_disrupted_pod_starts_again_uncounted(job: Any) -> None:
    rules = job["spec"]["podFailurePolicy"]["rules"]
    disruption = {"type": "DisruptionTarget", "status": "True"}
    assert rules[-1] == {"action": "Ignore", "onPodConditions": [disruption]}


def test_number_of_pods_has_one_source(rendered: Mapping[tuple[str, str], Any], job: Any) -> None:
    size = generated(rendered, "tandem-distill-size")
    spec = job["spec"]
    assert spec["completions"] == spec["parallelism"] == int(size["num_pods"]) >= 2
    assert int(size["num_processes"]) % int(size["num_pods"]) == 0


def test_pods_find_the_first_one_by_name(rendered: Mapping[tuple[str, str], Any], job: Any) -> None:
    service = rendered["Service", pod_of(job)["subdomain"]]
    arguments = " ".join(container_of(job)["args"])
    assert f"--main_process_ip=$(JOB_NAME)-0.{service['metadata']['name']} " in arguments
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    (port,) = map(int, re.findall(r"--main_process_port=(\d+)", arguments))
    assert [each["port"] for each in service["spec"]["ports"]] == [port, port + 1]


def test_selectors_are_those_of_the_pods(rendered: Mapping[tuple[str, str], Any], job: Any) -> None:
    labels = job["spec"]["template"]["metadata"]["labels"]
    policy = rendered["NetworkPolicy", "tandem-distill"]["spec"]
    (spread,) = pod_of(job)["topologySpreadConstraints"]
    pods = {"matchLabels": labels}
    assert rendered["Service", "tandem-distill-headless"]["spec"]["selector"] == labels
    assert policy["podSelector"] == spread["labelSelector"] == pods
    assert policy["ingress"] == [{"from": [{"podSelector": pods}]}]
    assert policy["egress"][0] == {"to": [{"podSelector": pods}]}


def test_only_output_and_tmp_can_be_written(job: Any) -> None:
    mounts = container_of(job)["volumeMounts"]
    writable = {mount["mountPath"] for mount in mounts if not mount.get("readOnly")}
    assert writable == {"/output", "/tmp"}
    assert container_of(job)["securityContext"]["readOnlyRootFilesystem"] is True


def test_grace_is_longer_than_the_launcher_takes(job: Any) -> None:
    """torch's launcher kills what is left after 30 s."""
    assert pod_of(job)["terminationGracePeriodSeconds"] > 30


def test_recipe_is_one_and_stays_within_the_mounts(
    rendered: Mapping[tuple[str, str], Any], tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(generated(rendered, "tandem-distill-recipe")["recipe.yaml"])
    config = load_config(path)
    assert config.teacher == "/teacher"
    assert (config.output_dir, config.cache_dir) == (Path("/output"), Path("/output/cache"))


def test_gpu_overlay_differs_by_image_and_device(job: Any) -> None:
    gpu = render(OVERLAY / "gpu")["Job", "tandem-distill"]
    container = container_of(gpu)
    for resources in container["resources"].values():
        assert resources.pop("nvidia.com/gpu") == "1"
    assert container.pop("image") == container_of(job)["image"].replace("-cpu", "-gpu")
    container["volumeMounts"].remove({"name": "shm", "mountPath": "/dev/shm"})
    container["image"] = container_of(job)["image"]
    pod = pod_of(gpu)
    pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "shm"]
    assert pod.pop("tolerations")
    assert pod.pop("runtimeClassName") == "nvidia"
    assert gpu == job
