"""The committed stubs are the ones that scripts/make_protos writes."""

import subprocess
import sys
from pathlib import Path

from protos.tandem.v1 import inference_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]


def make_protos(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "make_protos"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_committed_stubs_are_up_to_date() -> None:
    result = make_protos("--check")
    assert (result.returncode, result.stderr) == (0, "")


def test_file_has_the_same_name_as_on_the_wire() -> None:
    assert pb.DESCRIPTOR.name == "tandem/v1/inference.proto"
    assert pb.DESCRIPTOR.package == "tandem.v1"


def test_compare_has_the_field_numbers_of_generate() -> None:
    generate = {f.name: f.number for f in pb.GenerateRequest.DESCRIPTOR.fields}
    compare = {f.name: f.number for f in pb.CompareRequest.DESCRIPTOR.fields}
    assert {**compare, "route": 2} == generate
