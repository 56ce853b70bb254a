"""The Dockerfile and what its build is given; scripts/build_image tries the rest."""

from __future__ import annotations

import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.image import contents
from scripts.image.containers import run
from serve.app.config import ServeConfig
from serve.app.settings import ENV_PREFIX

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage: what it begins with, and its instructions in order."""

    base: str
    instructions: tuple[tuple[str, str], ...]

    def texts(self, keyword: str) -> list[str]:
        return [text for name, text in self.instructions if name == keyword]


def read_stages() -> dict[str, Stage]:
    """Return the stages by name; lines that go on are joined, comments left out."""
    lines = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    stages: dict[str, Stage] = {}
    for block in re.split(r"^FROM ", joined, flags=re.MULTILINE)[1:]:
        head, *rest = block.splitlines()
        base, _, name = head.partition(" AS ")
        pairs = (line.partition(" ")[::2] for line in rest)
        stages[name] = Stage(base, tuple(pairs))
    return stages


STAGES = read_stages()


@pytest.mark.parametrize("name", ["BASE_IMAGE", "GPU_BASE_IMAGE"])
def test_base_images_are_arguments_pinned_by_version_and_digest(name: str) -> None:
    pinned = rf"^ARG {name}=docker\.io/\S+:\d+\.\d+\.\d+-\S+@sha256:[0-9a-f]{{64}}$"
    assert re.search(pinned, DOCKERFILE, re.MULTILINE)


def test_device_chooses_the_base_and_all_else_stands_once() -> None:
    assert STAGES["cpu-base"] == Stage("${BASE_IMAGE}", ())
    assert STAGES["gpu-base"].base == "${GPU_BASE_IMAGE}"
    assert {name: stage.base for name, stage in STAGES.items() if name[1:] != "pu-base"} == {
        "base": "${DEVICE}-base",
        "packages": "base",
        "app": "packages",
        "image": "base",
    }


def test_image_serves_on_a_cpu_unless_it_is_told_otherwise() -> None:
    for stage in ("packages", "image"):
        assert {"DEVICE=cpu", "ROLE=serve"} <= set(STAGES[stage].texts("ARG"))
    assert list(STAGES)[-1] == "image"
    assert re.findall(r"^ARG DEVICE=(.*)$", DOCKERFILE, re.MULTILINE) == ["cpu"] * 3


def test_final_stage_only_copies_and_never_runs() -> None:
    stage = STAGES["image"]
    assert stage.texts("RUN") == []
    assert [text.rpartition(" ")[2] for text in stage.texts("COPY")] == ["/opt/tandem"] * 2
    assert all(text.startswith("--from=") for text in stage.texts("COPY"))


def test_process_is_tandem_itself_as_10001() -> None:
    stage = STAGES["image"]
    assert stage.texts("USER") == ["10001:10001"]
    assert stage.texts("ENTRYPOINT") == ['["tandem"]']
    assert stage.texts("CMD") == ['["serve"]']
    assert stage.texts("STOPSIGNAL") == ["SIGTERM"]
    assert stage.texts("HEALTHCHECK")[0].endswith('CMD ["tandem-healthcheck"]')
    assert "--uid 10001 --gid 10001" in " ".join(STAGES["base"].texts("RUN"))


def test_every_setting_in_the_environment_is_one_of_tandem() -> None:
    names = re.findall(rf"\b{ENV_PREFIX}([A-Z_]+)=", STAGES["image"].texts("ENV")[0])
    assert sorted(names) == ["BUNDLE", "READY_FILE"]
    assert {name.lower() for name in names} <= set(ServeConfig.model_fields)


def test_exposed_ports_are_the_default_ones() -> None:
    fields = ServeConfig.model_fields
    ports = [fields[name].default for name in ("port", "control_port", "metrics_port")]
    assert STAGES["image"].texts("EXPOSE") == [" ".join(map(str, ports))]


def test_label_has_the_version_of_the_project() -> None:
    version = PROJECT["project"]["version"]
    assert f'image.version="{version}"' in STAGES["image"].texts("LABEL")[0]


def test_onnxruntime_reports_to_nobody() -> None:
    assert "ORT_DISABLE_TELEMETRY=1" in STAGES["image"].texts("ENV")[0]


def test_no_build_argument_names_an_index_of_packages_with_credentials() -> None:
    arguments = re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE)
    known = {"BASE_IMAGE", "GPU_BASE_IMAGE", "DEVICE", "ROLE", "TORCH", "TORCH_INDEX", "REVISION"}
    assert set(arguments) == known


@pytest.mark.parametrize(
    ("role", "has", "lacks"),
    [
        ("serve", {"grpcio", "torch", "transformers", "onnxruntime"}, contents.EXPORT_PACKAGES),
        ("export", {"grpcio", "torch", "onnxruntime", "accelerate", "gguf"}, {"tandem"}),
    ],
)
def test_image_installs_the_packages_of_its_role(role: str, has: set[str], lacks: set[str]) -> None:
    script = (ROOT / "scripts" / "image" / "install_packages").read_text(encoding="utf-8")
    program = re.search(r"<<'PYTHON'\n(.*?)^PYTHON$", script, re.MULTILINE | re.DOTALL)
    assert program is not None
    printed = run([sys.executable, "-c", program[1], role, "cpu"]).splitlines()
    names = {re.split(r"[\[<>=;]", line)[0] for line in printed}
    assert has <= names
    assert not lacks & {name.replace("-", "_") for name in names}


# --- what the build is given


def allowed() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert lines[1] == "*"  # all else is ignored
    return [line[1:] for line in lines if line.startswith("!")]


def packages() -> list[str]:
    found = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    return [name.rstrip("*") for name in found]


def test_everything_allowed_into_the_build_exists() -> None:
    assert [path for path in allowed() if not (ROOT / path).exists()] == []


def test_every_package_is_allowed_into_the_build() -> None:
    assert set(packages()) <= set(allowed())


def test_every_file_that_runs_is_package_data_or_python() -> None:
    data = PROJECT["tool"]["setuptools"]["package-data"]
    listed = run(["git", "-C", str(ROOT), "ls-files", *packages()]).splitlines()
    others = {path for path in listed if Path(path).suffix not in {".py", ".pyi", ".proto"}}
    shipped = {
        str(path.relative_to(ROOT))
        for package, patterns in data.items()
        for pattern in patterns
        for path in (ROOT / package).glob(pattern)
    }
    # For `buf` alone.
    assert others - shipped == {"protos/baseline.binpb", "protos/buf.yaml"}
