"""scripts/build_image and the image's health check, without a build."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from scripts.image import bundles, contents, proofs
from scripts.image.building import ImageKind, PipSettings, build, read_pip_settings
from scripts.image.containers import Containers, ToolError, run
from serve.http.server import MetricsServer

ROOT = Path(__file__).resolve().parents[3]
HEALTHCHECK = ROOT / "scripts" / "image" / "healthcheck.py"


def check_health(ready_file: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-IS", str(HEALTHCHECK)],
        env=os.environ | {"TANDEM_READY_FILE": str(ready_file)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(("host", "is_healthy"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_healthcheck_asks_the_server_that_the_ready_file_names(
    tmp_path: Path, host: str, is_healthy: bool
) -> None:
    server = MetricsServer(CollectorRegistry(), lambda: is_healthy, host, 0)
    server.start()
    ready_file = tmp_path / "ready.json"
    ready_file.write_text(json.dumps({"metrics_url": server.url}), encoding="utf-8")
    try:
        code, said = check_health(ready_file)
    finally:
        server.stop()
    assert (code, said) == ((0, "") if is_healthy else (1, "not healthy: /healthz answers 503\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "FileNotFoundError"),
        ("{", "JSONDecodeError"),
        ("{}", "KeyError('metrics_url')"),
        ('{"metrics_url": "http://127.0.0.1:1/metrics"}', "ConnectionRefusedError"),
    ],
)
def test_healthcheck_fails_where_no_server_is_ready(
    tmp_path: Path, text: str | None, said: str
) -> None:
    ready_file = tmp_path / "ready.json"
    if text is not None:
        ready_file.write_text(text, encoding="utf-8")
    code, errors = check_health(ready_file)
    assert code == 1
    assert said in errors
    assert errors.startswith("not healthy: ")


# --- scripts/build_image


def test_build_without_root_says_why_and_what_else_there_is() -> None:
    done = subprocess.run(
        [str(ROOT / "scripts" / "build_image")],
        capture_output=True,
        text=True,
        check=False,
        user=65534 if os.geteuid() == 0 else None,
    )
    assert done.returncode == 2
    assert "needs root" in done.stderr
    assert "`docker build .`" in done.stderr


def test_bundle_that_is_not_there_is_wrong_usage(tmp_path: Path) -> None:
    command = [str(ROOT / "scripts" / "build_image"), "--bundle", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"--bundle {tmp_path}: there is no manifest.json" in done.stderr


def test_failed_tool_says_its_last_words() -> None:
    with pytest.raises(ToolError, match=r"sh -c .* exits with 3:\nno such wheel"):
        run(["sh", "-c", "echo no such wheel >&2; exit 3"])


def test_pip_settings_lend_folders_and_keep_their_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "index" / "simple").mkdir(parents=True)
    (tmp_path / "wheels").mkdir()
    config = tmp_path / "pip.conf"
    config.write_text(f"[global]\ncert = {tmp_path}/ca.pem\nfind-links = {tmp_path}/nowhere\n")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_FIND_LINKS", f"{tmp_path}/wheels {tmp_path}/nowhere")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file://{tmp_path}/index/simple")
    settings = read_pip_settings()
    assert settings.certificates == tmp_path / "ca.pem"
    assert settings.folders == [tmp_path / "index", tmp_path / "wheels"]
    assert f"find-links = {tmp_path}/wheels {tmp_path}/nowhere\n" in settings.text()
    assert "cert" not in settings.text()


def image_with(tmp_path: Path, *paths: str, text: str = "") -> Path:
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    return tmp_path


def test_compilers_are_found_by_any_name(tmp_path: Path) -> None:
    root = image_with(
        tmp_path, "usr/bin/x86_64-linux-gnu-gcc-12", "usr/bin/ld", "bin/cc", "usr/bin/awk"
    )
    assert contents.compilers(root) == ["bin/cc", "usr/bin/ld", "usr/bin/x86_64-linux-gnu-gcc-12"]


@pytest.mark.parametrize(
    ("path", "is_cache"),
    [
        ("root/.cache/pip/http/0/1", True),
        ("tmp/pip-ephem-wheel-cache-a/x.whl", True),
        ("opt/tandem/lib/python3.11/site-packages/pip/cache.py", False),
    ],
)
def test_cache_of_pip_is_told_from_pip(path: str, is_cache: bool) -> None:
    assert contents.is_pip_cache(path) == is_cache


@pytest.mark.parametrize(
    ("path", "is_list"),
    [
        ("var/lib/apt/lists/deb.debian.org_dists_bookworm_InRelease", True),
        ("var/lib/apt/lists/lock", False),
        ("var/cache/apt/pkgcache.bin", True),
        ("var/cache/apt/archives/gcc.deb", True),
        ("var/cache/apt/archives/lock", False),
    ],
)
def test_lists_of_apt_are_told_from_their_lock(path: str, is_list: bool) -> None:
    assert contents.is_apt_list(path) == is_list


def test_packages_of_training_are_found(tmp_path: Path) -> None:
    packages = "opt/tandem/lib/python3.11/site-packages"
    root = image_with(tmp_path, f"{packages}/optimum/x.py", f"{packages}/torch/__init__.py")
    assert contents.export_packages(root) == ["optimum"]


def test_traces_of_the_host_are_found_in_folders_texts_and_history(tmp_path: Path) -> None:
    source = "/opt/our-wheels"
    folder = tmp_path / "host" / "wheels"
    folder.mkdir(parents=True)
    settings = PipSettings({"index-url": source, "find-links": str(folder)}, None)
    root = image_with(tmp_path / "image", "etc/motd", text=f"see {source}")
    (root / folder.relative_to("/")).mkdir(parents=True)
    found = contents.host_traces(root, [root / "etc/motd"], {"History": [source]}, settings)
    assert list(found) == [
        f"the folder of a mount: {folder}",
        "the image's configuration",
        "etc/motd",
    ]
    clean = PipSettings({"index-url": "/opt/others"}, None)
    assert list(contents.host_traces(root, [root / "etc/motd"], {}, clean)) == []


@pytest.mark.parametrize("mode", [0o644, 0o600])
def test_bundle_that_only_root_can_read_is_copied(tmp_path: Path, mode: int) -> None:
    teacher = image_with(tmp_path / "teacher", "model.safetensors")
    manifest = json.dumps({"teacher": {"local_path": str(teacher)}})
    bundle = image_with(tmp_path / "bundle", "manifest.json", text=manifest)
    data = image_with(bundle, "onnx/model.onnx.data").joinpath("onnx/model.onnx.data")
    data.chmod(mode)
    served, served_teacher = bundles.readable_copies(bundle, tmp_path / "scratch")
    assert served_teacher == teacher
    assert (served == bundle) == (mode == 0o644)
    assert (served / "onnx/model.onnx.data").stat().st_mode & 0o777 == 0o644
    assert data.stat().st_mode & 0o777 == mode


def test_containers_run_without_rights_and_with_a_limit(tmp_path: Path) -> None:
    command = Containers(tmp_path).hardened("IMAGE", memory_mib=64)
    for flag in ("--read-only", "--cap-drop=all", "--security-opt=no-new-privileges",
                 "--user=10001:10001", "--memory=64m", "--memory-swap=64m", "--network=none",
                 f"--root={tmp_path}/root"):  # fmt: skip
        assert flag in command
    assert command[-1] == "IMAGE"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Containers]:
    """Have a tool do what a line of sh says; return containers that use it."""

    def put(name: str, line: str) -> Containers:
        folder = tmp_path / "tools"
        folder.mkdir()
        (folder / name).write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return Containers(tmp_path)

    return put


def test_build_that_fails_is_told_by_its_stage(
    install: Callable[[str, str], Containers],
) -> None:
    containers = install("buildah", "exit 7")
    with pytest.raises(ToolError, match="buildah exits with 7 for the stage base"):
        build(containers, ImageKind("serve", "gpu"), torch_index="")


def test_container_that_does_not_start_says_why(
    install: Callable[[str, str], Containers],
) -> None:
    containers = install("podman", "echo no such image >&2; exit 125")
    with pytest.raises(ToolError, match="does not start:\nno such image"):
        proofs.run_detached(containers, ["IMAGE"])


def test_server_that_ended_says_its_last_words(
    install: Callable[[str, str], Containers], tmp_path: Path
) -> None:
    stopped = json.dumps([{"State": {"Running": False}}])
    line = (
        f"case \"$*\" in *healthcheck*) exit 1;; *inspect*) echo '{stopped}';; "
        "*logs*) echo wrong bundle;; esac"
    )
    containers = install("podman", line)
    with (
        pytest.raises(ToolError, match="is_running=False; the end of its log:\nwrong bundle"),
        proofs.serving(containers, "IMAGE", tmp_path, None),
    ):
        pytest.fail("a server that ended was served")
