"""The manifests of k8s/ as scripts/check_k8s renders them, overlays with components included."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from scripts.k8s import render
from serve.app.config import ServeConfig
from serve.app.settings import load_settings
from tests.deploy.objects import Object, Rendered, component_of, load, pod_of

ROOT = Path(__file__).resolve().parents[2]
KUBECTL = shutil.which("kubectl") or str(ROOT / ".cache/k8s-tools/bin/kubectl")
needs_kubectl = pytest.mark.skipif(
    not Path(KUBECTL).exists(), reason="there is no kubectl; scripts/check_k8s installs one"
)
# The distillation's job is not a server; tests/deploy/test_distill_pods.py runs it.
SERVED = sorted(name for name in render.kustomizations() if "distill" not in name)


def render_all(folder: Path) -> dict[str, Rendered]:
    """Return every kustomization by its name."""
    return {name: load(Path(KUBECTL), name, folder) for name in render.kustomizations()}


def config_of(rendered: Rendered, deployment: Object, folder: Path) -> ServeConfig:
    """The settings in force in a pod: the file of its ConfigMap under its environment."""
    text, environ = rendered.settings_of(deployment)
    (folder / "serve.yaml").write_text(text, encoding="utf-8")
    return load_settings({}, environ, folder / "serve.yaml").config


def envoy_of(canary: Rendered) -> Object:
    (deployment,) = (each for each in canary.of("Deployment") if component_of(each) == "proxy")
    (volume,) = (each for each in pod_of(deployment)["volumes"] if each["name"] == "config")
    data = canary.named("ConfigMap", volume["configMap"]["name"])["data"]
    config: Object = yaml.safe_load(data["envoy.yaml"])
    return config


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))
