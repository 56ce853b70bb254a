"""scripts/check_k8s says no: to findings, to stale exceptions, to fields that do not exist."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from scripts.k8s import install, linters, render
from scripts.k8s.linters import AcceptedFindings, LinterFinding
from scripts.k8s.results import ROOT, KubeToolError, run

PYTHON = ROOT / ".cache" / "k8s-tools" / "bin" / "python"
needs_tools = pytest.mark.skipif(not PYTHON.exists(), reason="run scripts/check_k8s once")

FINDING = LinterFinding("checkov", "CKV_1", "cpu.yaml Deployment.tandem.tandem", "it is wrong")
ACCEPTED = AcceptedFindings("checkov", "CKV_1", "*.tandem.tandem*", "because")
DEPLOYMENT = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "d", "namespace": "n"},
    "spec": {
        "selector": {"matchLabels": {"a": "b"}},
        "template": {
            "metadata": {"labels": {"a": "b"}},
            "spec": {
                "containers": [{"name": "c", "image": "x", "securityContext": {"privileged": True}}]
            },
        },
    },
}
SCALED_OBJECT = {
    "apiVersion": "keda.sh/v1alpha1",
    "kind": "ScaledObject",
    "metadata": {"name": "s"},
    "spec": {"scaleTargetRef": {"name": "d"}, "triggers": [{"type": "t", "metadata": {}}]},
}


@pytest.mark.parametrize(
    ("change", "is_covered"),
    [
        ({}, True),
        ({"tool": "trivy"}, False),
        ({"check": "CKV_2"}, False),
        ({"resource": "x"}, False),
    ],
)
def test_exception_covers_its_tool_check_and_resources(
    change: dict[str, str], is_covered: bool
) -> None:
    fields = {"tool": "checkov", "check": "CKV_1", "resource": FINDING.resource, "text": "t"}
    found = linters.unexplained([LinterFinding(**{**fields, **change})], [ACCEPTED])
    assert (not found) == is_covered


def test_exception_that_nothing_needs_fails() -> None:
    assert not linters.judge_accepted([ACCEPTED], [FINDING]).problem
    assert linters.judge_accepted([ACCEPTED], []).problem == "no finding needs CKV_1 any more"


@pytest.mark.parametrize(
    ("reasons", "error"),
    [(["a", "b", "c", "d"], "4 exceptions; 3 are allowed"), ([" "], "gives no reason for CKV_0")],
)
def test_exceptions_are_few_and_explained(tmp_path: Path, reasons: list[str], error: str) -> None:
    file = tmp_path / "exceptions.yaml"
    entries = [
        {"tool": "checkov", "check": f"CKV_{index}", "resource": "*", "reason": reason}
        for index, reason in enumerate(reasons)
    ]
    file.write_text(yaml.safe_dump(entries), encoding="utf-8")
    with pytest.raises(KubeToolError, match=error):
        linters.read_accepted(file)


def test_missing_program_is_told() -> None:
    with pytest.raises(KubeToolError, match="no-such-program is not there"):
        run(["no-such-program"])


def test_what_is_applied_is_rendered_and_parts_are_not(tmp_path: Path) -> None:
    entries = {
        "base": {"kind": "Kustomization"},
        "components/tls": {"kind": "Component"},
        "overlays/split": {"kind": "Kustomization", "resources": ["student", "../../base"]},
        "overlays/split/student": {"kind": "Kustomization"},
        "overlays/job/gpu": {"kind": "Kustomization"},
    }
    for name, spec in entries.items():
        (tmp_path / name).mkdir(parents=True)
        text = yaml.safe_dump(spec)
        (tmp_path / name / "kustomization.yaml").write_text(text, encoding="utf-8")
    names = render.kustomizations(tmp_path)
    plain = {name for name, folders in names.items() if len(folders) == 1}
    assert plain == {"base", "split", "job-gpu"}
    assert names["split-tls"] == [tmp_path / "overlays/split", tmp_path / "components/tls"]


@pytest.mark.parametrize(
    ("said", "version"),
    [('{"clientVersion": {"gitVersion": "v1.32.4-x"}}', (1, 32)), ("{}", (0, 0)), ("no", (0, 0))],
)
def test_version_of_kubectl_is_read(tmp_path: Path, said: str, version: tuple[int, int]) -> None:
    program = tmp_path / "kubectl"
    program.write_text(f"#!/bin/sh\necho '{said}'\n", encoding="utf-8")
    program.chmod(0o755)
    assert install.kubectl_version(program) == version


def write_wheel(folder: Path, program: bytes) -> Path:
    """A wheel with a program where that of kubectl lies."""
    layer, package = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(layer, "w") as inner:
        inner.writestr("kubectl/kubectl", program)
    with tarfile.open(fileobj=package, mode="w:gz") as npm:
        entry = tarfile.TarInfo("package/lib/layer.zip")
        entry.size = len(layer.getvalue())
        npm.addfile(entry, io.BytesIO(layer.getvalue()))
    path = folder / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("x/_jsii/x.jsii.tgz", package.getvalue())
        wheel.writestr("x-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: x\nVersion: 1\n")
        wheel.writestr("x-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("x-1.dist-info/RECORD", "")
    return path


def test_kubectl_is_taken_out_of_the_wheel(tmp_path: Path) -> None:
    assert install.kubectl_of(write_wheel(tmp_path, b"program")) == b"program"


def test_unpacked_kubectl_that_does_not_run_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = write_wheel(tmp_path, b"#!/bin/sh\nexit 1\n")
    monkeypatch.setattr(install, "KUBECTL_WHEEL", str(wheel))
    with pytest.raises(KubeToolError, match="does not run here"):
        install.unpack_kubectl(tmp_path / "kubectl")
    assert not (tmp_path / "kubectl").exists()


def test_no_kubectl_and_none_to_be_had_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "KUBECTL_WHEEL", "./no-such-file.whl")
    with pytest.raises(KubeToolError, match="there is no kubectl, and pip cannot load one"):
        install.unpack_kubectl(tmp_path / "kubectl")


def test_debian_packages_that_are_missing_need_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "DEBIAN", {"no-such-program": "no-such-package"})
    monkeypatch.setattr("os.geteuid", lambda: 10001)
    with pytest.raises(
        KubeToolError, match="missing: no-such-package; run as root: apt-get install"
    ):
        install.install_prometheus()


def test_apt_that_fails_is_told_and_services_were_kept_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt, policy = tmp_path / "apt-get", tmp_path / "policy-rc.d"
    apt.write_text(f"#!/bin/sh\ncat {policy} >&2\nexit 1\n", encoding="utf-8")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(install, "DEBIAN", {"no-such-program": "no-such-package"})
    monkeypatch.setattr(install, "POLICY", policy)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(KubeToolError, match="apt-get update -q: #!/bin/sh\nexit 101"):
        install.install_prometheus()
    assert not policy.exists()


def test_linter_without_a_report_is_told_with_its_last_line() -> None:
    with pytest.raises(KubeToolError, match="trivy did not work: boom"):
        linters.parse_report("trivy", "", "log\nboom\n")


def in_tools(code: str, *arguments: Path) -> str:
    """Run code in the tools' environment, and return what it prints."""
    done = subprocess.run(
        [str(PYTHON), "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_tools
def test_unknown_fields_are_found_in_every_version_and_in_custom_resources(tmp_path: Path) -> None:
    wrong = [
        {**DEPLOYMENT, "spec": {**DEPLOYMENT["spec"], "replica": 2}},  # type: ignore[dict-item]
        {**SCALED_OBJECT, "spec": {**SCALED_OBJECT["spec"], "minReplicas": 2}},  # type: ignore[dict-item]
    ]
    for name, objects in (("good", [DEPLOYMENT, SCALED_OBJECT]), ("bad", wrong)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(objects), encoding="utf-8")
    code = (
        "import sys, json, pathlib; from scripts.k8s import schemas\n"
        "print(json.dumps([[r.problem for r in schemas.validate([pathlib.Path(p)])]"
        " for p in sys.argv[1:]]))"
    )
    good, bad = json.loads(in_tools(code, tmp_path / "good.yaml", tmp_path / "bad.yaml"))
    assert good == [""] * 4
    assert ["'replica' was unexpected" in problem for problem in bad[:3]] == [True] * 3
    assert "'minReplicas' was unexpected" in bad[3]


@needs_tools
def test_linters_find_a_privileged_container_and_broken_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(DEPLOYMENT), encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.yaml").write_text("apiVersion: v1\nkind: Pod\n  metadata: [", "utf-8")
    code = (
        "import sys, json, pathlib; from scripts.k8s import linters, results\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "found = linters.checkov(folder / 'd.yaml', 'kubernetes')[1]\n"
        "found += linters.trivy(folder / 'd.yaml')[1]\n"
        "print(json.dumps([f.check for f in found]))\n"
        "try: linters.checkov(folder / 'empty', 'kubernetes')\n"
        "except results.KubeToolError as error: print(error)\n"
        "try: linters.checkov(folder / 'broken.yaml', 'kubernetes')\n"
        "except results.KubeToolError as error: print(error)\n"
    )
    checks, error, broken = in_tools(code, tmp_path).strip().splitlines()
    assert {"CKV_K8S_16", "KSV-0017"} <= set(json.loads(checks))
    assert error == f"checkov found nothing to check in {tmp_path / 'empty'}"
    assert "broken.yaml" in broken


@needs_tools
def test_one_failed_line_fails_the_whole() -> None:
    code = (
        "import sys; from scripts.k8s import check\n"
        "from scripts.k8s.results import CheckResult, KubeToolError\n"
        "def broken():\n    yield CheckResult('a', 'b')\n"
        "    raise KubeToolError('it is not there')\n"
        "results = check.results_of(broken)\n"
        "print([r.problem for r in results], check.show(results))\n"
        "print(check.show(results[:1]))\n"
    )
    printed = in_tools(code)
    assert "['', 'it is not there'] 1" in printed
    assert printed.endswith("1 passed, 0 failed\n0\n")
