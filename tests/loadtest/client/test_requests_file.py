from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bundle.errors import UserError
from loadtest.client.requests_file import read_requests, write_requests
from loadtest.records import RequestRecord, SampleRecord
from tests.support.load_tests import planned, recorded


def record(number: int, per_token_k3: list[float]) -> RequestRecord:
    sample = SampleRecord(0, "STOP", [4, 5], [0.5, 0.75], "4 5", "5", True, 0.5, 2, per_token_k3)
    return recorded(planned(number, rate_rps=1.5, seed=7), ended_s=0.8, samples=[sample])


def test_records_are_read_back_as_they_were(tmp_path: Path) -> None:
    records = [record(0, [0.25, 0.25]), record(1, [])]
    write_requests(tmp_path / "r.jsonl", records)
    assert read_requests(tmp_path / "r.jsonl") == records


def test_not_a_number_is_null_in_the_file_and_comes_back(tmp_path: Path) -> None:
    write_requests(tmp_path / "r.jsonl", [record(0, [0.5, math.nan])])
    line = (tmp_path / "r.jsonl").read_text(encoding="utf-8")
    assert json.loads(line)["samples"][0]["per_token_k3"] == [0.5, None]
    (read,) = read_requests(tmp_path / "r.jsonl")
    assert read.samples[0].per_token_k3[0] == 0.5
    assert math.isnan(read.samples[0].per_token_k3[1])


@pytest.mark.parametrize("line", ["{", "[" * 3000, "[]", '{"samples": []}', '{"samples": [{}]}'])
def test_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "r.jsonl"
    write_requests(path, [record(0, [])])
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"r\.jsonl, line 2 is not a request's record"):
        read_requests(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"r\.jsonl: No such file"):
        read_requests(tmp_path / "r.jsonl")
