from __future__ import annotations

import dataclasses
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer

from tandem import doctor
from tandem.doctor import Finding, diagnose, render
from tandem.installation import Environment, cpuinfo, find_stubs_grpcio_version, gather
from tests.support.models.model_folders import TINY, write_model_folder
from tests.support.tiny_bundle import make_tiny_bundle

HEALTHY = Environment(
    python_version="3.11.7",
    requires_python=">=3.11,<3.13",
    requirements={
        "client": ("protobuf>=6.31.1,<8", "grpcio>=1.75"),
        "loadtest": ("PyYAML>=6",),
        "serve": ("torch>=2.8", "transformers>=4.56,<4.58", "PyYAML>=6"),
    },
    packages={
        "torch": "2.13.0+cpu",
        "transformers": "4.57.6",
        "protobuf": "6.33.6",
        "pyyaml": "6.0.3",
        "grpcio": "1.75.1",
        "optimum-onnx": "0.1.0",
        "onnxruntime": "1.31.1",
    },
    dependencies={"optimum-onnx": ("transformers>=4.36,<4.58",)},
    import_errors={},
    stubs_grpcio_version="1.75.1",
    cpu_model="EPYC",
    cpu_flags=("avx2", "avx512_vnni"),
    num_cores=2,
    memory_bytes=16 * 2**30,
    cuda_devices=(),
    execution_providers=("CPUExecutionProvider",),
)


def with_packages(**versions: str | None) -> Environment:
    changed = {name.replace("_", "-"): version for name, version in versions.items()}
    packages = {**HEALTHY.packages, **changed}
    present = {name: version for name, version in packages.items() if version is not None}
    return dataclasses.replace(HEALTHY, packages=present)


def with_facts(**facts: Any) -> Environment:
    return dataclasses.replace(HEALTHY, **facts)


def not_ok(environment: Environment) -> list[Finding]:
    return [finding for finding in diagnose(environment) if finding.level != "ok"]


def test_healthy_environment_has_no_complaints() -> None:
    assert not_ok(HEALTHY) == []


@pytest.mark.parametrize(
    ("environment", "subject", "message"),
    [
        (with_facts(python_version="3.13.0"), "python", "3.13.0 is not >=3.11,<3.13"),
        (with_packages(protobuf=None), "role client", "is not installed; missing: protobuf"),
        (with_packages(torch="2.7.1+cu126"), "torch", "2.7.1+cu126 is not >=2.8"),
        (with_packages(torch="unknown"), "torch", "unknown is not >=2.8"),
        (with_packages(protobuf="8.0.0"), "protobuf", "8.0.0 is not <8,>=6.31.1"),
        (with_packages(onnxruntime=None), "onnxruntime", "is missing: no student can be served"),
        (
            with_packages(onnxruntime_gpu="1.31.0"),
            "onnxruntime",
            "onnxruntime and onnxruntime-gpu are both installed",
        ),
        (with_packages(grpcio="1.75.0"), "grpcio", "older than the generated stubs"),
        (
            with_packages(grpcio_tools="1.85.1"),
            "grpcio-tools 1.85.1 + protobuf 6.33.6",
            "refuse protobuf below 7.35",
        ),
        (
            with_facts(dependencies={"vllm": ("protobuf<6; python_version > '3'",)}),
            "vllm",
            "needs protobuf<6, installed is 6.33.6",
        ),
        (
            with_facts(import_errors={"onnxruntime": "ImportError: libcudart.so.13"}),
            "onnxruntime",
            "cannot be imported: ImportError: libcudart.so.13",
        ),
    ],
)
def test_problem_is_named_and_says_what_to_do(
    environment: Environment, subject: str, message: str
) -> None:
    (finding,) = not_ok(environment)
    assert finding.level == "problem"
    assert finding.subject == subject
    assert message in finding.message
    assert finding.remedy


def test_role_that_is_not_installed_is_a_note() -> None:
    environment = with_packages(torch=None, transformers=None, onnxruntime=None, optimum_onnx=None)
    (finding,) = not_ok(environment)
    message = "is not installed; missing: torch, transformers"
    remedy = "pip install 'tandem[serve,cpu]'"
    assert finding == Finding("note", "role serve", message, remedy)
    assert Finding("ok", "role loadtest", "installed") in diagnose(environment)


def test_role_that_is_required_and_not_installed_is_a_problem() -> None:
    found = diagnose(with_packages(torch=None), required=["serve"])
    assert [each.subject for each in found if each.level == "problem"] == ["role serve"]


def test_transformers_too_new_for_the_exporter_is_a_bad_pair() -> None:
    found = not_ok(with_packages(transformers="4.58.0"))
    assert "transformers 4.58.0 + optimum-onnx 0.1.0" in [finding.subject for finding in found]
    assert {finding.level for finding in found} == {"problem"}


@pytest.mark.parametrize(
    "texts",
    [
        ("protobuf<6; extra == 'dev'",),  # an extra that nobody asked for
        ("protobuf<6; sys_platform == 'nowhere'",),
        ("tensorflow<1",),  # nothing that Tandem needs
        ("not a requirement ~~ 1",),
        ("protobuf>=6",),
    ],
)
def test_other_package_without_a_clash_is_left_alone(texts: tuple[str, ...]) -> None:
    assert not_ok(with_facts(dependencies={"other": texts})) == []


@pytest.mark.parametrize(
    ("environment", "subject", "message"),
    [
        (with_facts(cpu_flags=("avx2",)), "cpu", "no VNNI"),
        (with_facts(memory_bytes=2 * 2**30), "memory", "2.0 GiB"),
        (with_facts(cuda_devices=("NVIDIA H100",)), "cuda", "no CUDAExecutionProvider"),
    ],
)
def test_slow_machine_is_noted_but_healthy(
    environment: Environment, subject: str, message: str
) -> None:
    (finding,) = not_ok(environment)
    assert (finding.level, finding.subject) == ("note", subject)
    assert message in finding.message


def test_gpu_package_with_a_gpu_is_healthy() -> None:
    environment = dataclasses.replace(
        with_packages(onnxruntime=None, onnxruntime_gpu="1.31.0"),
        cuda_devices=("NVIDIA H100",),
        execution_providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
    )
    assert not_ok(environment) == []
    assert Finding("ok", "cuda", "NVIDIA H100") in diagnose(environment)


def test_unknown_cpu_is_no_complaint() -> None:
    environment = with_facts(cpu_flags=(), num_cores=1)
    assert not_ok(environment) == []
    assert Finding("ok", "cpu", "EPYC, 1 core, features unknown") in diagnose(environment)


# --- telling


def test_text_ends_with_a_verdict() -> None:
    problem = Finding("problem", "torch", "is missing", "pip install torch")
    text = render([Finding("ok", "python", "3.11"), problem])
    assert text.splitlines() == [
        " ok   python: 3.11",
        "FAIL  torch: is missing",
        "      → pip install torch",
        "",
        "1 problem found",
    ]
    assert render([]).endswith("Healthy.")


def test_json_holds_every_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "gather", lambda: HEALTHY)
    doctor.doctor(as_json=True)
    findings = json.loads(capsys.readouterr().out)
    assert [Finding(**finding) for finding in findings] == diagnose(HEALTHY)


def test_problem_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "gather", lambda: with_packages(protobuf=None))
    with pytest.raises(typer.Exit) as exit_info:
        doctor.doctor()
    assert exit_info.value.exit_code == 1
    assert "1 problem found" in capsys.readouterr().out


# --- gathering


def test_this_machine_can_be_looked_at() -> None:
    environment = gather()
    assert environment.packages["torch"] == metadata.version("torch")
    assert "CPUExecutionProvider" in environment.execution_providers
    assert environment.stubs_grpcio_version
    assert environment.memory_bytes > 2**28
    assert environment.num_cores >= 1


def test_broken_library_is_a_finding_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    errors = gather().import_errors
    assert set(errors) == {"torch", "onnxruntime"}
    assert errors["torch"].startswith("ModuleNotFoundError: import of torch halted")


def test_system_without_cpuinfo_has_no_flags(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("model name\t: X\nflags\t\t: avx2 fma\n")
    assert cpuinfo("flags", tmp_path / "cpuinfo") == "avx2 fma"
    assert cpuinfo("Features", tmp_path / "cpuinfo") == ""
    assert cpuinfo("flags", tmp_path / "missing") == ""


def test_newest_stubs_decide(tmp_path: Path) -> None:
    for name, version in {"a": "1.75.1", "b": "1.100.0"}.items():
        (tmp_path / f"{name}_pb2_grpc.py").write_text(f"GRPC_GENERATED_VERSION = '{version}'\n")
    assert find_stubs_grpcio_version(tmp_path) == "1.100.0"
    assert find_stubs_grpcio_version(tmp_path / "none") == ""


# --- folders that are named


def test_folders_are_judged_beside_the_installation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_model_folder(tmp_path / "good", {**TINY, "use_mrope": False})
    bad = write_model_folder(
        tmp_path / "bad", **{"modeling_x.py": "", "generation_config.json": "{}"}
    )
    with pytest.raises(typer.Exit):
        doctor.doctor(folders=[good, bad])
    text = capsys.readouterr().out
    assert f" ok   {good}: llama, 0.0 M parameters in F32; config.json, not read: use_mrope" in text
    assert f"FAIL  {bad}: {bad} holds code, which is not run: remove ['modeling_x.py']" in text


def test_folder_without_an_eos_is_a_problem(tmp_path: Path) -> None:
    config = {key: value for key, value in TINY.items() if key != "eos_token_id"}
    finding = doctor.examine(write_model_folder(tmp_path, config))
    assert (finding.level, "no completion would ever end" in finding.message) == ("problem", True)


def test_bundle_is_judged_with_the_models_in_it(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path)
    assert doctor.examine(bundle).message.startswith("a bundle of fp32; its student: llama, 0.1 M")
    (bundle / "student" / "config.json").unlink()
    assert "student/config.json is missing" in doctor.examine(bundle).message
