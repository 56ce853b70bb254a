"""Strict validation: Kubernetes' own schemas for three versions, and those of custom resources."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from kubernetes_validate.utils import all_versions

from scripts.k8s.results import CheckResult

NUM_VERSIONS = 3
# apiVersion → module with a model per kind, generated from the custom resources' definitions.
MODELS = {
    "keda.sh/v1alpha1": "cloudcoil.models.keda.v1alpha1",
    "monitoring.coreos.com/v1": "cloudcoil.models.prometheus_operator.v1",
    "monitoring.coreos.com/v1alpha1": "cloudcoil.models.prometheus_operator.v1alpha1",
}


def validate(rendered: Iterable[Path]) -> Iterator[CheckResult]:
    """Yield a result per version, and one for the custom resources."""
    objects = {
        yaml.safe_dump(each): (path.stem, each)
        for path in rendered
        for each in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    }
    custom = [item for item in objects.values() if item[1]["apiVersion"] in MODELS]
    plain = [item for item in objects.values() if item[1]["apiVersion"] not in MODELS]
    versions = list(dict.fromkeys(all_versions()))
    for version in versions[-NUM_VERSIONS:]:
        problems = [text for item in plain if (text := _check_plain(*item, version))]
        note = f"{len(plain)} different objects, strict"
        yield CheckResult("kubernetes-validate", f"Kubernetes {version}", "\n".join(problems), note)
    problems = [text for item in custom if (text := _check_custom(*item))]
    kinds = ", ".join(sorted({item[1]["kind"] for item in custom}))
    yield CheckResult(
        "jsonschema", "custom resources", "\n".join(problems), f"{len(custom)}: {kinds}"
    )


def _check_plain(source: str, thing: dict[str, Any], version: str) -> str:
    """Return what is wrong, empty for nothing."""
    try:
        kubernetes_validate.validate(thing, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{_name(source, thing)}: {'.'.join(map(str, error.path))}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:
        return f"{_name(source, thing)}: {error.message}"
    return ""


def _check_custom(source: str, thing: dict[str, Any]) -> str:
    """Do as `_check_plain`, by the schema of the model's kind."""
    validator = jsonschema.Draft202012Validator(schema_of(thing["apiVersion"], thing["kind"]))
    problems = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(thing)]
    return f"{_name(source, thing)}: {'; '.join(problems)}" if problems else ""


@cache
def schema_of(api_version: str, kind: str) -> Any:
    """Return a JSON schema that allows no field that the model does not have."""
    model = getattr(importlib.import_module(MODELS[api_version]), kind)
    return _strict(model.model_json_schema(by_alias=True))


def _strict(node: Any) -> Any:
    """Close every object whose fields are listed; the models themselves ignore others."""
    if isinstance(node, list):
        return [_strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    closed = {key: _strict(value) for key, value in node.items()}
    is_object = isinstance(node.get("properties"), dict) and node.get("type") == "object"
    return {"additionalProperties": False, **closed} if is_object else closed


def _name(source: str, thing: dict[str, Any]) -> str:
    return f"{source}: {thing['kind']}/{thing['metadata']['name']}"
