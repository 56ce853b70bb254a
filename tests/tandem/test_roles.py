"""What each role of pyproject.toml installs is what its code imports, no more and no less."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tandem.roles import ROLES, install_command, read_project

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {"client": PROJECT["dependencies"]} | PROJECT["optional-dependencies"]
FILES = {
    "client": (
        *("protos", "serve/client", "serve/rpc/credentials/cli.py", "tandem/*.py"),
        *(f"serve/{name}.py" for name in ("__init__", "addresses", "cpus", "errors")),
    ),
    "loadtest": ("loadtest", "report", "estimators", "bundle/yaml_file.py"),
    "serve": ("serve", "bundle", "estimators"),
    "export": ("export", "report", "tandem/demo*.py"),
}
# Roles and extras whose packages the files of a role may rely on.
BELOW = {
    "client": (),
    "loadtest": ("client",),
    "serve": ("client", "cpu", "math"),
    "export": ("client", "cpu", "serve", "math", "reasoning-gym"),
}
# Where the package of a module has another name. What is installed with a package is its own.
PACKAGES = {
    "google.protobuf": "protobuf",
    "google.rpc": "googleapis-common-protos",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "grpc_status": "grpcio-status",
    "latex2sympy2_extended": "math-verify",
    "markupsafe": "jinja2",
    "optimum": "optimum-onnx",
    "pydantic_core": "pydantic",
    "yaml": "pyyaml",
}
# Imported by what is installed, which does not ask for it.
NOT_IMPORTED_HERE = {"onnx-ir"}
OWN = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"protos"}
HEAVY = "accelerate,gguf,onnx,onnxruntime,optimum,safetensors,tokenizers,torch,transformers"


def modules_of(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, those for type checkers left out."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        nodes.extend(ast.iter_child_nodes(node))


def package_of(module: str) -> str | None:
    """Return the package that a module comes from; None for Python's and Tandem's own."""
    first, second = (*module.split("."), "")[:2]
    if first in sys.stdlib_module_names or first in OWN:
        return None
    name = PACKAGES.get(f"{first}.{second}", PACKAGES.get(first, first))
    return name.replace("_", "-")


def files_of(role: str) -> Iterator[Path]:
    for pattern in FILES[role]:
        for path in ROOT.glob(pattern):
            yield from path.rglob("*.py") if path.is_dir() else [path]


def imported_by(role: str) -> set[str]:
    files = set(files_of(role))
    if role == "client":
        files -= set(files_of("export"))  # tandem demo
    names = {package_of(module) for path in files for module in modules_of(path)}
    return {name for name in names if name is not None}


def declared(names: Iterable[str]) -> set[str]:
    requirements = (Requirement(text) for name in names for text in EXTRAS[name])
    return {each.name for each in requirements} - {"tandem"}


@pytest.mark.parametrize("role", ROLES)
def test_role_installs_what_its_files_import(role: str) -> None:
    assert imported_by(role) - declared([role, *BELOW[role]]) == set()


@pytest.mark.parametrize("role", ROLES)
def test_role_installs_nothing_that_its_files_do_not_import(role: str) -> None:
    assert declared([role]) - imported_by(role) <= NOT_IMPORTED_HERE


def test_client_installs_nothing_heavy() -> None:
    light = {"googleapis-common-protos", "grpcio", "grpcio-status", "packaging", "protobuf"}
    assert declared(["client"]) == light | {"rich", "typer"}


def test_all_has_every_role() -> None:
    (everything,) = map(Requirement, EXTRAS["all"])
    assert everything.name == "tandem"
    assert set(ROLES) - {"client"} <= everything.extras


# --- without the packages of other roles


def run_without(packages: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.support.without_packages", packages, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "words",
    ["ask --help", "control --help", "token me", "doctor --help", "loadtest --help",
     "loadtest run --help", "loadtest report --help", "loadtest gate --help",
     "loadtest compare --help", "serve --help"],
)  # fmt: skip
def test_command_without_models_shows_its_help(words: str) -> None:
    done = run_without(HEAVY, *words.split())
    assert (done.returncode, done.stderr.partition("Traceback")[1]) == (0, "")


@pytest.mark.parametrize("words", ["ask --help", "control --help", "token me", "doctor --help"])
def test_command_of_a_client_needs_no_package_of_another_role(words: str) -> None:
    others = "jinja2,matplotlib,numpy,prometheus_client,scipy,yaml"
    assert run_without(f"{HEAVY},{others}", *words.split()).returncode == 0


@pytest.mark.parametrize(
    ("words", "packages", "role"),
    [
        ("serve --bundle /none", HEAVY, "serve"),
        ("serve --help", "yaml", "serve"),
        ("export run export/recipes/demo.yaml", HEAVY, "export"),
        ("loadtest run --out none", "numpy", "loadtest"),
        ("demo", HEAVY, "export"),
    ],
)
def test_command_whose_role_is_missing_says_in_one_line_what_to_install(
    words: str, packages: str, role: str
) -> None:
    done = run_without(packages, *words.split())
    assert done.returncode == 1
    line = rf"tandem: {words.split()[0]} needs \w+, which is not installed: (.*)\n"
    told = re.fullmatch(line, done.stderr)
    assert told is not None and told[1] == install_command(role), done.stderr


# --- what the project says


def test_requirements_come_from_pip_where_there_is_no_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tandem-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tandem\nVersion: 0.1.0\nRequires-Python: >=3.11\n"
        "Requires-Dist: grpcio>=1.75\nRequires-Dist: tomli; python_version < '3'\n"
        "Provides-Extra: serve\nRequires-Dist: torch>=2.8; extra == 'serve'\n"
        "Provides-Extra: export\nRequires-Dist: tandem[serve]; extra == 'export'\n"
        "Requires-Dist: gguf>=0.10; (sys_platform != 'nowhere') and extra == 'export'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    project = read_project(tmp_path)
    assert project.requires_python == ">=3.11"
    assert project.requirements == {
        "client": ("grpcio>=1.75",),
        "loadtest": (),
        "serve": ("torch>=2.8",),
        "export": ("torch>=2.8", "gguf>=0.10"),
    }
