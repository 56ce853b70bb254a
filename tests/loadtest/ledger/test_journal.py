"""Journals as files: what a client writes there, and what is read of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bundle.errors import UserError
from loadtest.ledger.journal import Journal, read_journal
from loadtest.ledger.ledger import check, main
from protos.tandem.v1 import inference_pb2 as pb
from tests.support.loadtest.histories import SENT, USAGE, WHOLE, Events


def write(path: Path, events: Events) -> Path:
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


@pytest.mark.parametrize(("events", "code"), [(WHOLE, 0), (WHOLE[:-1], 1)])
def test_program_exits_with_the_verdict(tmp_path: Path, events: Events, code: int) -> None:
    path = write(tmp_path / "j", events)
    command = [sys.executable, "-m", "loadtest.ledger", str(path), "--reference", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done
    assert ("NOT BALANCED" in done.stdout) is bool(code)


def test_violations_are_shown_to_a_bound(tmp_path: Path, capsys: Any) -> None:
    lonely = [USAGE | {"id": f"r{number}"} for number in range(25)]
    assert main([str(write(tmp_path / "j", lonely))]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "  and 5 more" and len(shown) == 23


def test_line_that_a_killed_client_cut_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "j", WHOLE)
    with path.open("a") as file:
        file.write('{"id": "x", "ev')
    assert list(read_journal([path])) == WHOLE


KILLED = """
import os, signal, sys
from pathlib import Path
from bundle.errors import UserError
from loadtest.ledger.journal import Journal
from protos.tandem.v1 import inference_pb2 as pb
request = pb.GenerateRequest(request_id="r", prompt="x", route=pb.ROUTE_STUDENT)
request.sampling.seed = 1
journal = Journal(Path(sys.argv[1]))
journal.sent(request)
chunk = pb.TokenChunk(role=pb.ROLE_STUDENT, token_ids=range(3000))
journal.received("r", pb.GenerateResponse(tokens=chunk))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_client_had_written_is_there(tmp_path: Path) -> None:
    path = tmp_path / "j"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -9
    events = list(read_journal([path]))
    assert [event["event"] for event in events] == ["sent", "tokens"]
    assert len(events[1]["token_ids"]) == 3000
    assert check(events, may_be_open=True).is_balanced


@pytest.mark.parametrize(
    "line",
    [
        "nonsense", "\udcff", "[]", '{"id": "a"}', "7", '{"id": "a", "event": "end"}', "[" * 3000,
        '{"id": "a", "event": ["end"]}', '{"id": ["a"], "event": "end", "code": "OK"}',
        '{"id": "a", "event": "end", "code": {}}', json.dumps(SENT | {"num_samples": 10**12}),
    ],
)  # fmt: skip
def test_line_that_is_no_event_is_named(tmp_path: Path, line: str, capsys: Any) -> None:
    path = tmp_path / "j"
    path.write_text(f"{json.dumps(SENT)}\n{line}\n", "utf-8", "surrogateescape")
    assert main([str(path)]) == 2
    assert f"{path}, line 2 is no event" in capsys.readouterr().err


def test_folder_is_all_the_journals_in_it_and_none_is_an_error(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "a.0.jsonl", WHOLE)
    write(tmp_path / "a.1.jsonl", [event | {"id": "b"} for event in WHOLE])
    assert len(list(read_journal([tmp_path]))) == 2 * len(WHOLE)
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    assert "has no journal" in capsys.readouterr().err


def test_journal_that_cannot_be_written_is_said() -> None:
    told = pytest.raises(UserError, match="/dev/full cannot be written: No space left")
    with told, Journal(Path("/dev/full")) as journal:
        journal.sent(REQUEST)


def test_journal_that_is_not_there_is_said(tmp_path: Path, capsys: Any) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "No such file" in capsys.readouterr().err


# The journal


REQUEST = pb.GenerateRequest(
    request_id="r", prompt="x", route=pb.ROUTE_STUDENT, sampling=pb.SamplingParams(seed=1)
)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r: r.ClearField("request_id"), "request_id and sampling.seed"),
        (lambda r: r.ClearField("sampling"), "request_id and sampling.seed"),
        (lambda r: r.ClearField("route"), "a route that names the models"),
    ],
)
def test_journal_refuses_what_it_could_not_check(
    tmp_path: Path, change: Callable[[Any], None], text: str
) -> None:
    request = pb.GenerateRequest.FromString(REQUEST.SerializeToString())
    change(request)
    with Journal(tmp_path / "j") as journal, pytest.raises(ValueError, match=text):
        journal.sent(request)
    assert (tmp_path / "j").read_text() == ""


def test_same_request_has_the_same_hash_whatever_its_id(tmp_path: Path) -> None:
    other = pb.GenerateRequest.FromString(REQUEST.SerializeToString())
    other.request_id = "s"
    with Journal(tmp_path / "j") as journal:
        for request in (REQUEST, other):
            journal.sent(request)
        other.sampling.seed = 2
        journal.sent(other)
    first, second, third = (event["what"] for event in read_journal([tmp_path / "j"]))
    assert first == second != third
