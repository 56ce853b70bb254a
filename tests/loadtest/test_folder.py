"""The folder of a run: a new one, one that holds something, one of a run that died."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bundle.errors import UserError
from loadtest.client.requests_file import keeping, part_file, part_files, read_parts
from loadtest.folder import make_folder, read_records, read_run, write_json
from loadtest.records import RequestRecord
from tests.support.load_tests import planned, recorded


def record(number: int) -> RequestRecord:
    return recorded(planned(number))


def dead_run(folder: Path) -> Path:
    """Write what a run of two processes leaves that was killed in the middle of a line."""
    write_json(folder / "run.json", {"num_requests": 9})
    for process, numbers in enumerate(([0, 2], [1])):
        with keeping(part_file(folder, process)) as keep:
            for number in numbers:
                keep([record(number)])
    with part_file(folder, 0).open("ab") as file:
        file.write(b'{"plan":{"num')
    return folder


def test_parts_are_read_by_number_without_the_line_that_was_begun(tmp_path: Path) -> None:
    found = read_records(dead_run(tmp_path))
    assert [each.plan.number for each in found] == [0, 1, 2]
    assert found[0] == record(0)


def test_records_are_on_disk_when_they_are_kept(tmp_path: Path) -> None:
    path = part_file(tmp_path, 0)
    with keeping(path) as keep:
        keep([record(0), record(1)])
        assert len(read_parts([path])) == 2


def test_broken_line_within_a_part_is_an_error(tmp_path: Path) -> None:
    part_file(tmp_path, 0).write_text("{}\n{}\n")
    with pytest.raises(UserError, match=r"part\.jsonl, line 1 is not a request's record"):
        read_records(tmp_path)


def test_disk_that_is_full_is_said() -> None:
    told = pytest.raises(UserError, match="/dev/full cannot be written: No space left")
    with told, keeping(Path("/dev/full")) as keep:
        keep([record(0)])


def test_run_that_died_is_not_touched_and_told_what_to_do(tmp_path: Path) -> None:
    dead_run(tmp_path)
    with pytest.raises(UserError, match=r"holds a run that died: 3 of .*report .*--overwrite"):
        make_folder(tmp_path)
    assert len(part_files(tmp_path)) == 2


def test_run_may_be_overwritten_and_other_files_stay(tmp_path: Path) -> None:
    (dead_run(tmp_path) / "notes.txt").write_text("mine")
    make_folder(tmp_path, may_overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("may_overwrite", [False, True])
def test_folder_of_something_else_is_never_touched(tmp_path: Path, may_overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is not empty, and holds no load test; give a new folder"):
        make_folder(tmp_path, may_overwrite=may_overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_finished_run_is_told_as_such(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {})
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="it holds a finished run; give a new folder, or --over"):
        make_folder(tmp_path)


def test_run_file_must_be_an_object(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="it is no JSON object"):
        read_run(tmp_path)
