"""What generic linters do not know of k8s/: that settings, probes, ports and volumes agree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from serve.addresses import is_loopback
from serve.app.server import MAX_CLOSE_S
from serve.metrics.server_metrics import ServerMetrics
from tests.deploy.objects import Rendered, container_of, pod_of, ports_of
from tests.deploy.rendered import ROOT, SERVED, config_of, envoy_of, needs_kubectl, seconds

pytestmark = needs_kubectl
PLACEHOLDER = re.compile(r"ghcr\.io/tandem/tandem:\d+\.\d+\.\d+-(cpu|gpu)")
PINNED = re.compile(r"docker\.io/[a-z/]+:[\w.-]+@sha256:[0-9a-f]{64}")


# --- settings


def test_every_server_has_settings_that_are_accepted(rendered: Rendered, tmp_path: Path) -> None:
    for server in rendered.servers():
        container = container_of(server)
        assert container["args"][0] == "serve"
        config_of(rendered, server, tmp_path)


def test_command_prints_the_settings_of_the_base(
    all_rendered: dict[str, Rendered], tmp_path: Path
) -> None:
    base = all_rendered["base"]
    (config,) = base.of("ConfigMap")
    file = tmp_path / "serve.yaml"
    file.write_text(config["data"]["serve.yaml"], encoding="utf-8")
    command = [sys.executable, "-m", "tandem", "serve", "--config", str(file), "--print-config"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert yaml.safe_load(done.stdout)["drain_grace_s"] == 30


def test_models_are_mounted_where_the_settings_say(rendered: Rendered, tmp_path: Path) -> None:
    for server in rendered.servers():
        config = config_of(rendered, server, tmp_path)
        mounts = {mount["mountPath"] for mount in container_of(server)["volumeMounts"]}
        wanted = {str(path) for path in (config.bundle, config.teacher) if isinstance(path, Path)}
        assert wanted == mounts & {"/bundle", "/teacher"}


def test_open_listeners_are_meant_and_control_is_the_pods_own(
    rendered: Rendered, tmp_path: Path
) -> None:
    for server in rendered.servers():
        config = config_of(rendered, server, tmp_path)
        assert is_loopback(config.control_host)
        assert not is_loopback(config.host)
        assert not is_loopback(config.metrics_host)
        assert config.insecure_listen == (config.tls_cert is None)


def test_a_gpu_is_asked_for_exactly_where_the_settings_name_it(
    rendered: Rendered, tmp_path: Path
) -> None:
    for server in rendered.servers():
        container = container_of(server)
        has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert (config_of(rendered, server, tmp_path).device == "cuda") == has_gpu
        assert container["image"].endswith("-gpu") == has_gpu


# --- ends and probes


def test_drain_fits_into_the_termination_grace(rendered: Rendered, tmp_path: Path) -> None:
    for server in rendered.servers():
        config = config_of(rendered, server, tmp_path)
        pause_s = container_of(server)["lifecycle"]["preStop"]["sleep"]["seconds"]
        drain_s = pause_s + config.drain_delay_s + config.drain_grace_s + MAX_CLOSE_S
        assert pod_of(server)["terminationGracePeriodSeconds"] > drain_s


def test_liveness_outlasts_a_drain(rendered: Rendered, tmp_path: Path) -> None:
    for server in rendered.servers():
        config = config_of(rendered, server, tmp_path)
        probe = container_of(server)["livenessProbe"]
        patience_s = (probe["failureThreshold"] - 1) * probe["periodSeconds"]
        assert patience_s > config.drain_delay_s + config.drain_grace_s + MAX_CLOSE_S


def test_envoy_leaves_a_server_before_it_refuses_work(
    all_rendered: dict[str, Rendered], tmp_path: Path
) -> None:
    canary = all_rendered["canary"]
    clusters = envoy_of(canary)["static_resources"]["clusters"]
    checks = [check for cluster in clusters for check in cluster.get("health_checks", ())]
    assert checks
    for check in checks:
        noticed_s = seconds(check["interval"]) * check["unhealthy_threshold"]
        for server in canary.servers():
            assert noticed_s < config_of(canary, server, tmp_path).drain_delay_s


def test_probes_speak_what_the_listener_speaks(rendered: Rendered, tmp_path: Path) -> None:
    for server in rendered.servers():
        ports = ports_of(server)
        is_plain = config_of(rendered, server, tmp_path).tls_cert is None
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container_of(server)[kind]
            assert ("grpc" in probe) == is_plain
            if is_plain:
                assert probe["grpc"] == {"port": ports["grpc"], "service": "readiness"}
            else:
                assert probe["httpGet"] == {"path": "/healthz", "port": "metrics"}


# --- ports, selectors, names


def test_container_ports_are_those_of_the_settings(rendered: Rendered, tmp_path: Path) -> None:
    for server in rendered.servers():
        config = config_of(rendered, server, tmp_path)
        assert ports_of(server) == {
            "grpc": config.port,
            "control": config.control_port,
            "metrics": config.metrics_port,
        }


def test_every_service_reaches_a_port_of_one_deployment(rendered: Rendered) -> None:
    for service in rendered.of("Service"):
        (deployment,) = rendered.selected(service["spec"]["selector"])
        for port in service["spec"]["ports"]:
            assert ports_of(deployment)[port["targetPort"]] == port["port"]


def test_headless_services_bear_the_names_of_their_deployments(rendered: Rendered) -> None:
    for service in rendered.of("Service"):
        if service["spec"].get("clusterIP") == "None":
            (deployment,) = rendered.selected(service["spec"]["selector"])
            assert service["metadata"]["name"] == f"{deployment['metadata']['name']}-headless"


def test_control_is_in_no_service(rendered: Rendered) -> None:
    for service in rendered.of("Service"):
        assert "control" not in [port["targetPort"] for port in service["spec"]["ports"]]


def test_each_deployment_selects_its_own_pods_alone(rendered: Rendered) -> None:
    for deployment in rendered.of("Deployment"):
        assert rendered.selected(deployment["spec"]["selector"]["matchLabels"]) == [deployment]
        for spread in pod_of(deployment)["topologySpreadConstraints"]:
            assert rendered.selected(spread["labelSelector"]["matchLabels"]) == [deployment]


def test_each_deployment_has_one_disruption_budget(rendered: Rendered) -> None:
    budgets = rendered.of("PodDisruptionBudget")
    chosen = [rendered.selected(each["spec"]["selector"]["matchLabels"]) for each in budgets]
    names = [deployment["metadata"]["name"] for found in chosen for deployment in found]
    assert sorted(names) == sorted(each["metadata"]["name"] for each in rendered.of("Deployment"))


def test_autoscalers_point_at_deployments_that_leave_the_number_open(rendered: Rendered) -> None:
    scalers = rendered.of("HorizontalPodAutoscaler") + rendered.of("ScaledObject")
    targets = [scaler["spec"]["scaleTargetRef"]["name"] for scaler in scalers]
    assert len(set(targets)) == len(targets)
    for deployment in rendered.of("Deployment"):
        is_scaled = deployment["metadata"]["name"] in targets
        assert ("replicas" in deployment["spec"]) == (not is_scaled)
    assert set(targets) <= {each["metadata"]["name"] for each in rendered.of("Deployment")}


@pytest.mark.parametrize(("name", "kind"), [("split", 1), ("split-keda", 0)])
def test_students_have_one_autoscaler(
    all_rendered: dict[str, Rendered], name: str, kind: int
) -> None:
    split = all_rendered[name]
    assert len(split.of("HorizontalPodAutoscaler")) == kind
    assert len(split.of("ScaledObject")) == 1 - kind


def test_queue_is_counted_by_a_metric_that_exists(all_rendered: dict[str, Rendered]) -> None:
    (scaler,) = all_rendered["split-keda"].of("ScaledObject")
    (trigger,) = scaler["spec"]["triggers"]
    (name,) = re.findall(r"tandem_\w+", trigger["metadata"]["query"])
    families = ServerMetrics(CollectorRegistry()).registry.collect()
    assert name in {family.name for family in families}


def test_accounts_exist_and_show_no_token(rendered: Rendered) -> None:
    accounts = {each["metadata"]["name"]: each for each in rendered.of("ServiceAccount")}
    for deployment in rendered.of("Deployment"):
        pod = pod_of(deployment)
        assert not accounts[pod["serviceAccountName"]]["automountServiceAccountToken"]
        assert not pod["automountServiceAccountToken"]


def test_no_pod_gets_the_variables_of_services(all_rendered: dict[str, Rendered]) -> None:
    for rendered in all_rendered.values():
        for each in rendered.of("Deployment"):
            assert pod_of(each)["enableServiceLinks"] is False
        for pod in rendered.of("Pod"):
            assert pod["spec"]["enableServiceLinks"] is False


# --- volumes, images, resources


def test_every_volume_but_tmp_is_read_only(rendered: Rendered) -> None:
    for deployment in rendered.of("Deployment"):
        volumes = {volume["name"]: volume for volume in pod_of(deployment)["volumes"]}
        mounts = container_of(deployment)["volumeMounts"]
        assert {mount["name"] for mount in mounts} == set(volumes)
        writable = {mount["mountPath"] for mount in mounts if not mount.get("readOnly")}
        assert writable == {"/tmp"}
        assert volumes["tmp"]["emptyDir"]["sizeLimit"]


def test_claims_are_those_that_the_loader_makes(
    rendered: Rendered, all_rendered: dict[str, Rendered]
) -> None:
    made = {each["metadata"]["name"] for each in all_rendered["loader"].of("PersistentVolumeClaim")}
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for deployment in rendered.of("Deployment")
        for volume in pod_of(deployment)["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claims <= made | {"tandem-bundle-canary"}


@pytest.mark.parametrize("name", [name for name in SERVED if "image" in name])
def test_image_volumes_leave_no_claim(all_rendered: dict[str, Rendered], name: str) -> None:
    for server in all_rendered[name].servers():
        volumes = {volume["name"]: volume for volume in pod_of(server)["volumes"]}
        models = volumes.keys() & {"bundle", "teacher"}
        assert models
        for model in models:
            assert set(volumes[model]) == {"name", "image"}


def test_images_are_the_placeholder_or_pinned_by_digest(
    all_rendered: dict[str, Rendered],
) -> None:
    for rendered in all_rendered.values():
        for deployment in rendered.of("Deployment"):
            image = container_of(deployment)["image"]
            assert PLACEHOLDER.fullmatch(image) or PINNED.fullmatch(image), image


def test_memory_and_cpu_are_reserved_in_full(rendered: Rendered) -> None:
    for deployment in rendered.of("Deployment"):
        resources = container_of(deployment)["resources"]
        assert resources["requests"] == resources["limits"]
        assert resources["limits"]["cpu"].isdigit()  # threads are counted in whole cores
