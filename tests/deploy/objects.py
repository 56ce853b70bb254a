"""The objects of a rendered kustomization, and what its pods are told."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scripts.k8s import render
from scripts.k8s.results import ROOT

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rendered:
    """The objects of one kustomization."""

    objects: tuple[Object, ...]

    def of(self, kind: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] == kind]

    def named(self, kind: str, name: str) -> Object:
        (found,) = (each for each in self.of(kind) if each["metadata"]["name"] == name)
        return found

    def servers(self) -> list[Object]:
        return [each for each in self.of("Deployment") if container_of(each)["name"] == "tandem"]

    def selected(self, labels: dict[str, str]) -> list[Object]:
        """Return the Deployments whose pods have these labels."""
        return [
            each
            for each in self.of("Deployment")
            if labels.items() <= each["spec"]["template"]["metadata"]["labels"].items()
        ]

    def settings_of(self, deployment: Object) -> tuple[str, dict[str, str]]:
        """Return the config file of a pod's ConfigMap, and the TANDEM_ variables beside it."""
        container = container_of(deployment)
        (option,) = (each for each in container["args"] if each.startswith("--config="))
        file = Path(option.removeprefix("--config="))
        (mount,) = (m for m in container["volumeMounts"] if m["mountPath"] == str(file.parent))
        (volume,) = (v for v in pod_of(deployment)["volumes"] if v["name"] == mount["name"])
        data = self.named("ConfigMap", volume["configMap"]["name"])["data"]
        given = {each["name"]: each["value"] for each in container.get("env", ())}
        return data[file.name], image_environ() | given


def load(kubectl: Path, name: str, folder: Path) -> Rendered:
    """Render one of `render.kustomizations` below a folder, and read it."""
    target = folder / "rendered"
    target.mkdir(exist_ok=True)
    result = render.render(kubectl, name, render.kustomizations()[name], target)
    assert not result.problem, result.problem
    text = (target / f"{name}.yaml").read_text(encoding="utf-8")
    return Rendered(tuple(yaml.safe_load_all(text)))


def pod_of(deployment: Object) -> Object:
    pod: Object = deployment["spec"]["template"]["spec"]
    return pod


def container_of(deployment: Object) -> Object:
    (container,) = pod_of(deployment)["containers"]
    return dict(container)


def ports_of(deployment: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container_of(deployment)["ports"]}


def component_of(deployment: Object) -> str:
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    return str(labels["app.kubernetes.io/component"])


def image_environ() -> dict[str, str]:
    """Return the settings that the images themselves bring along."""
    return dict(re.findall(r"(TANDEM_\w+)=(\S+)", (ROOT / "Dockerfile").read_text("utf-8")))
