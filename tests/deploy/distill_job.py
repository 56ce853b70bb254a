"""The distillation Job as kubectl renders it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.rendered import KUBECTL

OVERLAY = Path("k8s/overlays/distill-job")


def render(overlay: Path) -> dict[tuple[str, str], Any]:
    """Return an overlay's objects by kind and name."""
    rendered = subprocess.run(
        [KUBECTL, "kustomize", str(overlay)], check=True, capture_output=True, text=True
    ).stdout
    objects = yaml.safe_load_all(rendered)
    return {(each["kind"], each["metadata"]["name"]): each for each in objects}


def pod_of(job: Any) -> Any:
    return job["spec"]["template"]["spec"]


def container_of(job: Any) -> Any:
    (container,) = pod_of(job)["containers"]
    return container


def generated(rendered: Mapping[tuple[str, str], Any], name: str) -> Any:
    """Return the data of a generated ConfigMap, whose name has its hash."""
    (data,) = [each["data"] for key, each in rendered.items() if key[1].startswith(name)]
    return data


def action_on(job: Any, exit_code: int) -> str:
    """Return what the Job does about a pod that exits with a code: the first rule that matches."""
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        on = rule.get("onExitCodes")
        if on and on["operator"] == "In" and exit_code in on["values"]:
            assert on["containerName"] == container_of(job)["name"]
            return str(rule["action"])
    return "Count"
