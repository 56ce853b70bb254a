"""A virtual environment per role, made from Tandem's wheel: each does its work with no more."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tandem.roles import ROLES

ROOT = Path(__file__).parents[2]
TINY_BUNDLE = ROOT / "scripts" / "image" / "tiny_bundle.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]


class Installation:
    """A virtual environment with Tandem's wheel and some extras."""

    def __init__(self, folder: Path, wheel: Path, extras: str) -> None:
        self._folder = folder
        run(sys.executable, "-m", "venv", str(folder))
        constraints = ("--constraint", str(ROOT / "constraints.txt"))
        wanted = f"{wheel}[{extras}]" if extras else str(wheel)
        self.run("pip", "install", "--quiet", *constraints, wanted)

    def run(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        return run(str(self._folder / "bin" / program), *words, cwd=self._folder)

    def tandem(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the command, which may exit with any code."""
        command = [str(self._folder / "bin" / "tandem"), *words]
        return subprocess.run(
            command, cwd=self._folder, capture_output=True, text=True, check=False
        )

    def python(self, code: str) -> str:
        return self.run("python", "-c", code).stdout.strip()

    @property
    def roles(self) -> set[str]:
        """The roles that `tandem doctor` finds; it finds no problem."""
        done = self.tandem("doctor", "--json")
        findings = json.loads(done.stdout)
        assert done.returncode == 0, [each for each in findings if each["level"] == "problem"]
        return {
            each["subject"].removeprefix("role ")
            for each in findings
            if each["subject"].startswith("role ") and each["level"] == "ok"
        }


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tandem's wheel, built from a copy: a build leaves its folders in the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    run("git", "checkout-index", "--all", f"--prefix={folder}/source/")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={folder}",
        f"{folder}/source")  # fmt: skip
    (built,) = folder.glob("tandem-*.whl")
    return built


def test_client_calls_and_says_what_else_could_be_installed(wheel: Path, tmp_path: Path) -> None:
    client = Installation(tmp_path / "venv", wheel, "")
    client.python("from serve.client import AsyncClient, Client, ControlClient")
    assert client.roles == {"client"}
    asked = client.tandem("ask", "Hello?", "--target", "127.0.0.1:1", "--connect-timeout-s", "0.2")
    assert (asked.returncode, "no connection" in asked.stderr) == (1, True)
    assert len(client.tandem("token", "me").stdout) > 40
    for command, word in (("loadtest", "plan"), ("serve", "--help"), ("export", "--help")):
        done = client.tandem(command, word)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert done.stderr.startswith(f"tandem: {command} needs ")
        assert f"pip install 'tandem[{command}" in done.stderr


def test_loadtest_plans_without_models(wheel: Path, tmp_path: Path) -> None:
    loadtest = Installation(tmp_path / "venv", wheel, "loadtest")
    assert loadtest.roles == {"client", "loadtest"}
    planned = loadtest.tandem("loadtest", "plan", "--rates", "2", "--duration", "10", "--json")
    assert json.loads(planned.stdout.splitlines()[-1]), planned.stderr
    loadtest.python("import loadtest.report.page")


def test_export_makes_a_bundle_that_serve_accepts(wheel: Path, tmp_path: Path) -> None:
    export = Installation(tmp_path / "export", wheel, "export,cpu")
    assert export.roles >= {"client", "serve", "export"}
    export.run("python", str(TINY_BUNDLE), str(tmp_path))
    serve = Installation(tmp_path / "serve", wheel, "serve,cpu")
    assert serve.roles == {"client", "serve"}
    bundle = str(tmp_path / "run" / "bundle")
    assert serve.tandem("doctor", "--role", "serve", bundle).returncode == 0
    code = "import serve.app.process, serve.models.onnx_session, serve.models.torch_backend"
    serve.python(code)
    assert serve.tandem("serve", "--bundle", bundle, "--print-config").returncode == 0


def test_all_has_every_role(wheel: Path, tmp_path: Path) -> None:
    everything = Installation(tmp_path / "venv", wheel, "all,cpu")
    assert everything.roles == set(ROLES)
    everything.python("import math_verify, report")


def test_wheel_holds_no_measurement_and_no_test(wheel: Path) -> None:
    names = run(sys.executable, "-m", "zipfile", "--list", str(wheel)).stdout
    assert "serve/client/" in names
    assert not {"bench", "tests", "scripts"} & {line.partition("/")[0] for line in names.split()}
