"""The ledger against histories that are broken in one place each, and against a real server."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loadtest.journal import Journal, read_journal
from loadtest.ledger import Fault, check, main, render
from protos.tandem.v1 import inference_pb2 as pb

Events = list[dict[str, Any]]

# log r of the three tokens: 0.5, -0.25, 0
LOGPROBS = [-1.0, -0.5, -2.0]
REFERENCE_LOGPROBS = [-0.5, -0.75, -2.0]
DIVERGENCE = {
    "num_tokens": 3,
    "nonfinite_tokens": 0,
    "k1_sum": -0.25,
    "k2_sum": 0.15625,
    "k3_sum": 0.14872127 + 0.02880078,
    "reference_logprobs": REFERENCE_LOGPROBS,
}


def event(kind: str, request_id: str = "a", **fields: Any) -> dict[str, Any]:
    return {"id": request_id, "event": kind, **fields}


def tokens(position: int, *token_ids: int, index: int = 0) -> dict[str, Any]:
    return event("tokens", role="student", index=index, position=position, token_ids=[*token_ids])


def sample(index: int = 0, **fields: Any) -> dict[str, Any]:
    given = {
        "finish_reason": "FINISH_REASON_STOP",
        "token_ids": [7, 8, 9],
        "logprobs": LOGPROBS,
        "divergence": copy.deepcopy(DIVERGENCE),
        **fields,
    }
    return event("sample", role="student", index=index, **given)


SENT = event(
    "sent", rpc="Generate", seed=1, prompt_sha256="p", what="w", roles=["student"], num_samples=1
)
END = event("end", code="OK")
WHOLE: Events = [SENT, tokens(0, 7), tokens(1, 8, 9), sample(), event("usage"), END]


def replaced(at: int, *events: dict[str, Any]) -> Events:
    return [*WHOLE[:at], *events, *WHOLE[at + 1 :]]


def test_whole_history_is_balanced() -> None:
    ledger = check(WHOLE, WHOLE)
    assert ledger.is_balanced and render(ledger).endswith("balanced")
    assert (ledger.num_requests, ledger.num_samples, ledger.num_compared) == (1, 1, 1)


BROKEN: dict[str, tuple[Events, Fault, str]] = {
    "no end": (WHOLE[:-1], Fault.LOST, "has no end"),
    "no usage": (replaced(4), Fault.LOST, "Usage did not come"),
    "no sample": (replaced(3), Fault.LOST, "student sample 0 did not come"),
    "gap": (replaced(1), Fault.LOST, "tokens 0 to 0 did not come"),
    "two ends": ([*WHOLE, END], Fault.DUPLICATED, "ended 2 times: OK, OK"),
    "behind the end": ([*WHOLE, tokens(3, 1)], Fault.DUPLICATED, "tokens behind the end"),
    "two usages": (replaced(4, WHOLE[4], WHOLE[4]), Fault.DUPLICATED, "Usage came 2 times"),
    "two samples": (replaced(3, sample(), sample()), Fault.DUPLICATED, "came 2 times"),
    "chunk again": (replaced(2, tokens(0, 7), WHOLE[2]), Fault.DUPLICATED, "token 0 came again"),
    "late chunk": (
        replaced(3, sample(), tokens(3, 1)), Fault.DUPLICATED, "tokens behind the whole sample"
    ),
    "sample too many": (
        replaced(3, sample(), sample(1)), Fault.DUPLICATED, "sample 1 was not asked for"
    ),
    "sent again": ([SENT, *WHOLE], Fault.DUPLICATED, "sent 2 times"),
    "never sent": (WHOLE[1:], Fault.ALTERED, "never sent"),
    "other chunk": (replaced(1, tokens(0, 6)), Fault.ALTERED, "chunks and sample have other"),
    "logprob missing": (
        replaced(3, sample(logprobs=[-1.0])), Fault.ALTERED, "not one log-probability for each"
    ),
    "reference missing": (
        replaced(3, sample(divergence={**DIVERGENCE, "reference_logprobs": [-1.0]})),
        Fault.ALTERED,
        "not one reference log-probability",
    ),
    "other k3": (
        replaced(3, sample(divergence={**DIVERGENCE, "k3_sum": 0.1776})),
        Fault.ALTERED,
        "k3_sum is 0.1776, its tokens give 0.1775",
    ),
    "token dropped from the count": (
        replaced(3, sample(divergence={**DIVERGENCE, "num_tokens": 2})),
        Fault.ALTERED,
        "num_tokens is 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_history_is_objected_to(name: str) -> None:
    events, fault, text = BROKEN[name]
    ledger = check(events)
    assert any(v.fault is fault and text in v.text for v in ledger.violations), ledger.violations
    assert ledger.count(fault) == 1 and not ledger.is_balanced


def other_run(**fields: Any) -> Events:
    """The same request in a run without faults, where its sample had other fields."""
    return [e | {"id": "b"} for e in (SENT, sample(**fields), event("usage"), END)]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"token_ids": [7, 8, 5]}, "other tokens than without faults"),
        ({"token_ids": [7, 8, 9, 1], "logprobs": [*LOGPROBS, -1.0]}, "other tokens than"),
        ({"finish_reason": "FINISH_REASON_LENGTH"}, "FINISH_REASON_STOP, not FINISH_REASON_LENGTH"),
        ({"logprobs": [-1.0, -0.5, -2.1]}, "log-probability -2.0, without faults -2.1"),
    ],
)
def test_other_answer_than_without_faults_is_altered(fields: dict[str, Any], text: str) -> None:
    ledger = check(WHOLE, other_run(**fields))
    assert [v.fault for v in ledger.violations] == [Fault.ALTERED]
    assert text in ledger.violations[0].text


@pytest.mark.parametrize(("newest", "is_balanced"), [(8, True), (5, False)])
def test_cancelled_call_has_a_beginning_of_the_answer(newest: int, is_balanced: bool) -> None:
    cancelled = [SENT, tokens(0, 7, newest), event("end", code="CANCELLED")]
    ledger = check(cancelled, other_run())
    assert (ledger.is_balanced, ledger.num_compared) == (is_balanced, 1)


def test_sample_that_ended_early_has_a_beginning_of_the_answer() -> None:
    early = {"finish_reason": "FINISH_REASON_DEADLINE", "divergence": None}
    for ids, is_balanced in (([7, 8], True), ([8], False), ([7, 8, 9, 9], False)):
        part = sample(**early, token_ids=ids, logprobs=LOGPROBS[: len(ids)])
        history = [SENT, part | {"logprobs": []}, event("usage"), END]
        assert check(history, other_run()).is_balanced is is_balanced


def test_failed_call_needs_no_samples() -> None:
    assert check([SENT, event("end", code="UNAVAILABLE")]).is_balanced


def test_open_call_is_allowed_where_its_client_was_killed() -> None:
    assert check(WHOLE[:2], may_be_open=True).is_balanced


# Files


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
    lonely = [event("usage", f"r{number}") for number in range(25)]
    assert main([str(write(tmp_path / "j", lonely))]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "  and 5 more" and len(shown) == 23


def test_line_that_a_killed_client_cut_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "j", WHOLE)
    with path.open("a") as file:
        file.write('{"id": "x", "ev')
    assert list(read_journal([path])) == WHOLE


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"id": "a"}', "7"])
def test_line_that_is_no_event_is_named(tmp_path: Path, line: str, capsys: Any) -> None:
    path = tmp_path / "j"
    path.write_text(f"{json.dumps(SENT)}\n{line}\n")
    assert main([str(path)]) == 2
    assert f"{path}, line 2 is no event" in capsys.readouterr().err


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
