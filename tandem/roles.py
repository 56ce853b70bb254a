"""The roles that Tandem is installed for, and what each of them needs.

A role is an extra of pyproject.toml. Every installation is a client: what `client` needs has no
extra.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
CLIENT = "client"
# What to install for each. With CUDA `gpu` stands in the place of `cpu`.
_TANDEM = {
    CLIENT: "tandem",
    "loadtest": "tandem[loadtest]",
    "serve": "tandem[serve,cpu]",
    "export": "tandem[export,cpu]",
}
ROLES = tuple(_TANDEM)

Extras = Mapping[str, Sequence[str]]  # the base requirements are those of ""


@dataclass(frozen=True)
class Project:
    """What Tandem says that it needs: the range of Python, the requirements of each role."""

    requires_python: str
    requirements: Mapping[str, tuple[str, ...]]


def install_command(role: str) -> str:
    """Return what adds a role to this environment.

    >>> install_command("client"), install_command("serve")
    ("pip install 'tandem'", "pip install 'tandem[serve,cpu]'")
    """
    return f"pip install '{_TANDEM[role]}'"


def read_project(root: Path = ROOT) -> Project:
    """Return what the checkout's pyproject.toml says; where there is none, what pip recorded."""
    path = root / "pyproject.toml"
    if path.exists():
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        extras = {"": project["dependencies"]} | project["optional-dependencies"]
        return Project(project["requires-python"], requirements_of_roles(extras))
    installed = metadata.distribution("tandem")
    names = ("", *(installed.metadata.get_all("Provides-Extra") or ()))
    recorded = [Requirement(text) for text in installed.requires or ()]
    extras = {
        name: [_without_marker(each) for each in recorded if _is_of_extra(each, name)]
        for name in names
    }
    return Project(installed.metadata["Requires-Python"], requirements_of_roles(extras))


def requirements_of_roles(extras: Extras) -> dict[str, tuple[str, ...]]:
    """Return the requirements of each role on this platform, without those of `client`.

    >>> extras = {"": ["grpcio"], "serve": ["torch"], "export": ["tandem[serve]", "gguf"]}
    >>> requirements_of_roles(extras)
    {'client': ('grpcio',), 'loadtest': (), 'serve': ('torch',), 'export': ('torch', 'gguf')}
    """
    return {role: tuple(_resolve(extras, "" if role == CLIENT else role)) for role in ROLES}


def _resolve(extras: Extras, name: str) -> Iterator[str]:
    """Yield the requirements of an extra; `tandem[serve]` stands for those of `serve`."""
    for requirement in map(Requirement, extras.get(name, ())):
        if requirement.name == "tandem":
            for extra in sorted(requirement.extras):
                yield from _resolve(extras, extra)
        elif requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _without_marker(requirement)


def _is_of_extra(requirement: Requirement, name: str) -> bool:
    if requirement.marker is None:
        return name == ""
    is_base = requirement.marker.evaluate({"extra": ""})
    return is_base if name == "" else not is_base and requirement.marker.evaluate({"extra": name})


def _without_marker(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"
