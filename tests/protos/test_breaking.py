"""`make check` holds the protos to protos/baseline.binpb: additions pass, breaking changes fail."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTOS = Path(__file__).resolve().parents[2] / "protos"
BUF = Path(sys.executable).parent / "buf"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PROTOS, tmp_path / "protos"))


def buf(command: str, protos: Path) -> subprocess.CompletedProcess[str]:
    against = ["--against", str(protos / "baseline.binpb")] if command == "breaking" else []
    return subprocess.run(
        [BUF, command, str(protos), *against], capture_output=True, text=True, check=False
    )


def edit(protos: Path, old: str, new: str) -> None:
    path = protos / "tandem" / "v1" / "inference.proto"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_what_stands_there_breaks_nothing() -> None:
    result = buf("breaking", PROTOS)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_added_field_passes(copy: Path) -> None:
    field = "message TopLogprobs {\n  // Where.\n  optional uint32 position = 2;"
    edit(copy, "message TopLogprobs {", field)
    result = buf("breaking", copy)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("optional uint64 seed = 8;", "optional uint64 seed = 88;", 'field "8" with name "seed"'),
        ("optional uint64 seed = 8;", "optional string seed = 8;", 'from "uint64" to "string"'),
        ("rpc Score(ScoreRequest)", "rpc Rate(ScoreRequest)", 'RPC "Score"'),
    ],
)
def test_breaking_change_fails(copy: Path, old: str, new: str, complaint: str) -> None:
    edit(copy, old, new)
    result = buf("breaking", copy)
    assert result.returncode == 100
    assert complaint in result.stdout


def test_foreign_specification_keeps_its_own_names(copy: Path) -> None:
    folder = copy / "oip"
    folder.mkdir(exist_ok=True)
    (folder / "foreign.proto").write_text('syntax = "proto3";\npackage inference;\nmessage a {}\n')
    assert buf("lint", copy).returncode == 0
    (folder / "foreign.proto").rename(copy / "tandem" / "v1" / "foreign.proto")
    assert buf("lint", copy).returncode == 100
