"""docs/api.md is what scripts/make_docs writes from the protos, whole and with working links."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from protos.tandem.v1 import control_pb2, inference_pb2

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def make_docs(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(root / "scripts" / "make_docs"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def section(heading: str) -> str:
    """What stands under a heading, up to the next one."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", PAGE, re.M | re.S)
    assert found, f"no heading {heading!r}"
    return found[1]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository with the protos, the script and the page alone."""
    shutil.copytree(ROOT / "protos" / "tandem", tmp_path / "protos" / "tandem")
    for name in ("scripts/make_docs", "docs/api.md"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_committed_page_is_up_to_date() -> None:
    result = make_docs(ROOT, "--check")
    assert (result.returncode, result.stderr) == (0, "")


def test_changed_comment_fails_the_check_until_the_page_is_written(copy: Path) -> None:
    proto = copy / "protos" / "tandem" / "v1" / "control.proto"
    proto.write_text(proto.read_text().replace("// Its version.", "// Its age <in years | days>."))
    result = make_docs(copy, "--check")
    assert (result.returncode, result.stderr) == (
        1,
        "docs/api.md is out of date: run scripts/make_docs\n",
    )
    assert make_docs(copy).returncode == 0
    assert make_docs(copy, "--check").returncode == 0
    row = "| `version` | string |  | Its age &lt;in years \\| days>. |"
    assert row in (copy / "docs" / "api.md").read_text(encoding="utf-8")


def test_proto_that_does_not_compile_is_an_error(copy: Path) -> None:
    (copy / "protos" / "tandem" / "v1" / "bad.proto").write_text("message {")
    result = make_docs(copy)
    assert result.returncode == 1
    assert "protoc failed with status" in result.stderr


@pytest.mark.parametrize("module", [inference_pb2, control_pb2])
def test_every_rpc_message_field_and_enum_value_has_its_place(module: object) -> None:
    file = module.DESCRIPTOR  # type: ignore[attr-defined]
    for service in file.services_by_name.values():
        for rpc in service.methods:
            assert f"[{rpc.output_type.name}]" in section(f"{service.name}.{rpc.name}")
    for message in file.message_types_by_name.values():
        assert re.findall(r"^\| `(\w+)`", section(message.name), re.M) == [
            field.name for field in message.fields
        ]
    for enum in file.enum_types_by_name.values():
        assert re.findall(r"^\| `(\w+)` \| (\d+)", section(enum.name), re.M) == [
            (value.name, str(value.number)) for value in enum.values
        ]


def test_every_link_leads_to_one_heading() -> None:
    headings = [line.lstrip("# ") for line in PAGE.splitlines() if line.startswith("#")]
    anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(set(anchors)) == len(anchors)
    links = set(re.findall(r"\]\(#([^)]*)\)", PAGE))
    assert links
    assert links <= set(anchors)


def test_presence_tells_optional_fields_from_plain_ones() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*\| [^|]*) \|", section("GenerateRequest"), re.M))
    assert rows["request_id"] == "string | "
    assert rows["prompt"] == "string | oneof `input`"
    assert rows["sampling"] == "[SamplingParams](#samplingparams) | optional"
    assert "`seed` | uint64 | optional" in section("SamplingParams")
    assert "uint32 → double | map" in section("Agreement")
