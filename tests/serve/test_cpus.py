"""How many CPUs there are by quotas of both versions of control groups, and how threads wait."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.cpus import bound_spinning, count_cpus


@pytest.fixture(autouse=True)
def many_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


def process(tmp_path: Path, groups: str, *mounts: str) -> Path:
    """Write a process's `cgroup` and `mountinfo`; in mounts, {} is the temporary folder."""
    folder = tmp_path / "proc"
    folder.mkdir()
    (folder / "cgroup").write_text(groups)
    lines = ["21 1 8:1 / / rw - ext4 /dev/vda rw", *(m.format(tmp_path) for m in mounts)]
    (folder / "mountinfo").write_text("\n".join(lines) + "\n")
    return folder


def v2(group: str) -> str:
    return f"31 23 0:28 {group} {{}}/v2 rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"


def v1(group: str) -> str:
    return f"32 31 0:29 {group} {{}}/v1 rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max 100000", 64), ("200000 100000", 2), ("50000 100000", 1), ("350000 100000", 3)],
)
@pytest.mark.parametrize("where", ["v2/pod/worker", "v2/pod", "v2"])
def test_quota_of_version_2_counts_at_every_level(
    tmp_path: Path, where: str, limit: str, expected: int
) -> None:
    (tmp_path / "v2/pod/worker").mkdir(parents=True)
    write(tmp_path / where / "cpu.max", limit)
    assert count_cpus(process(tmp_path, "0::/pod/worker\n", v2("/"))) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 64), ("200000", 2), ("50000", 1)])
@pytest.mark.parametrize("where", ["v1/pod/worker", "v1/pod"])
def test_quota_of_version_1_counts_at_every_level(
    tmp_path: Path, where: str, quota: str, expected: int
) -> None:
    (tmp_path / "v1/pod/worker").mkdir(parents=True)
    write(tmp_path / where / "cpu.cfs_quota_us", quota)
    write(tmp_path / where / "cpu.cfs_period_us", "100000")
    groups = "4:memory:/elsewhere\n3:cpu,cpuacct:/pod/worker\n0::/\n"
    assert count_cpus(process(tmp_path, groups, v1("/"))) == expected


@pytest.mark.parametrize(
    ("groups", "mount"),
    [
        ("0::/\n", v2("/")),  # a namespace of its own
        ("0::/../other\n", v2("/")),
        ("0::/kubepods/pod7\n", v2("/kubepods/pod7")),
        ("0::/host/path\n", v2("/docker/7")),
    ],
)
def test_container_sees_its_own_quota(tmp_path: Path, groups: str, mount: str) -> None:
    write(tmp_path / "v2/cpu.max", "200000 100000")
    assert count_cpus(process(tmp_path, groups, mount)) == 2


def test_smallest_of_all_quotas_counts(tmp_path: Path) -> None:
    write(tmp_path / "v2/a/cpu.max", "500000 100000")
    write(tmp_path / "v2/cpu.max", "300000 100000")
    assert count_cpus(process(tmp_path, "0::/a\n", v2("/"))) == 3


@pytest.mark.parametrize("limit", ["", "one two", "100000", "max"])
def test_limit_that_cannot_be_read_is_none(tmp_path: Path, limit: str) -> None:
    write(tmp_path / "v2/cpu.max", limit)
    assert count_cpus(process(tmp_path, "0::/\n", v2("/"))) == 64
    assert count_cpus(tmp_path / "absent") == 64


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A group of one CPU below another one, in whichever hierarchy of this machine has quotas."""
    for parent in (
        Path("/sys/fs/cgroup/cpu"),
        Path("/sys/fs/cgroup/cpu,cpuacct"),
        Path("/sys/fs/cgroup"),
    ):
        outer = parent / f"tandem-test-{os.getpid()}"
        inner = outer / "inner"
        is_v2 = (parent / "cgroup.subtree_control").exists()
        try:
            if is_v2:
                (parent / "cgroup.subtree_control").write_text("+cpu")
            inner.mkdir(parents=True)
            if is_v2:
                (outer / "cpu.max").write_text("100000 100000")
            else:
                (outer / "cpu.cfs_quota_us").write_text("100000")
        except OSError:
            for folder in (inner, outer):
                if folder.is_dir():
                    folder.rmdir()
            continue
        yield inner
        inner.rmdir()
        outer.rmdir()
        return
    pytest.skip("this process may not make control groups with a quota")


def test_quota_of_a_real_group_around_ones_own(real_group: Path) -> None:
    code = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()));"
        "os.sched_getaffinity = lambda _: range(64);"
        "from serve.cpus import count_cpus; print(count_cpus())"
    )
    command = [sys.executable, "-c", code, str(real_group / "cgroup.procs")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "1"}),
    ],
)
def test_spinning_is_bounded_unless_it_is_set(
    given: dict[str, str], expected: dict[str, str]
) -> None:
    environ = dict(given)
    bound_spinning(environ)
    assert environ == expected


@pytest.mark.parametrize("module", ["serve.app.config", "export.run.settings", "tandem.cli"])
def test_spinning_is_bounded_before_torch_is_loaded(module: str) -> None:
    environ = {
        k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    code = (
        f"import {module}, os, sys; print('torch' in sys.modules, 'GOMP_SPINCOUNT' in os.environ)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True"]
