"""The ledger against histories that are broken in one place each, and against a real server."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loadtest.ledger.journal import Journal, read_journal
from loadtest.ledger.ledger import Fault, check, main, render
from protos.tandem.v1 import inference_pb2 as pb

Events = list[dict[str, Any]]

# log r of the three tokens: 0.5, -0.25, 0
LOGPROBS = [-1.0, -0.5, -2.0]
REFERENCE_LOGPROBS = [-0.5, -0.75, -2.0]
DIVERGENCE = {
    "num_tokens": 3,
    "nonfinite_tokens": 0,
    "large_ratio_tokens": 0,
    "k1_sum": -0.25,
    "k2_sum": 0.15625,
    "k3_sum": 0.14872127 + 0.02880078,
    "k1_mean": -0.25 / 3,
    "k2_mean": 0.15625 / 3,
    "k3_mean": (0.14872127 + 0.02880078) / 3,
    "max_abs_log_ratio": 0.5,
    "reference_logprobs": REFERENCE_LOGPROBS,
}


def event(kind: str, request_id: str = "a", /, **fields: Any) -> dict[str, Any]:
    return {"id": request_id, "event": kind, **fields}


def tokens(position: int, *token_ids: int, index: int = 0) -> dict[str, Any]:
    logprobs = LOGPROBS[position : position + len(token_ids)]
    fields = {"position": position, "token_ids": [*token_ids], "logprobs": logprobs}
    return event("tokens", role="student", index=index, text="x" * len(token_ids), **fields)


def sample(index: int = 0, *, role: str = "student", **fields: Any) -> dict[str, Any]:
    given = {
        "finish_reason": "FINISH_REASON_STOP",
        "token_ids": [7, 8, 9],
        "logprobs": LOGPROBS,
        "text": "xxx",
        "answer": None,
        "correct": None,
        "divergence": copy.deepcopy(DIVERGENCE),
        "divergence_error": "",
        **fields,
    }
    return event("sample", role=role, index=index, **given)


SENT = event(
    "sent", rpc="Generate", seed=1, prompt_sha256="p", what="w", roles=["student"], num_samples=1,
    max_tokens=4, streams=True, vote="none",
)  # fmt: skip
USAGE = event("usage", request_id="a", seed=1, completion_tokens={"student": 3})
END = event("end", code="OK")
WHOLE: Events = [SENT, tokens(0, 7), tokens(1, 8, 9), sample(), USAGE, END]


def replaced(at: int, *events: dict[str, Any]) -> Events:
    return [*WHOLE[:at], *events, *WHOLE[at + 1 :]]


def test_whole_history_is_balanced() -> None:
    ledger = check(WHOLE, WHOLE)
    assert ledger.is_balanced and render(ledger).endswith("balanced")
    assert (ledger.num_requests, ledger.num_samples, ledger.num_compared) == (1, 1, 1)


AGREEMENT = event(
    "agreement", student=None, teacher=None, same_answer=None, student_pass_at_k={},
    teacher_pass_at_k={},
)  # fmt: skip
BROKEN: dict[str, tuple[Events, Fault, str]] = {
    "no end": (WHOLE[:-1], Fault.LOST, "has no end"),
    "no usage": (replaced(4), Fault.LOST, "Usage did not come"),
    "no sample": (replaced(3), Fault.LOST, "student sample 0 did not come"),
    "gap": (replaced(1), Fault.LOST, "tokens 0 to 0 did not come"),
    "two ends": ([*WHOLE, END], Fault.DUPLICATED, "ended 2 times, with OK the last time"),
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
    "sent when it was over": ([*WHOLE, SENT], Fault.DUPLICATED, "sent again under one id"),
    "sample behind Usage": (
        [*WHOLE[:3], USAGE, sample(), END], Fault.DUPLICATED, "sample behind Usage"
    ),
    "chunks that nobody asked for": (
        replaced(0, SENT | {"streams": False}), Fault.DUPLICATED, "chunks were not asked for"
    ),
    "sample too many in a call that failed": (
        [SENT, tokens(0, 7, index=1), event("end", code="CANCELLED")],
        Fault.DUPLICATED,
        "sample 1 was not asked for",
    ),
    "agreement that nobody asked for": (
        replaced(4, AGREEMENT, USAGE), Fault.DUPLICATED, "agreement was not asked for"
    ),
    "no chunk": (
        [SENT, sample(), USAGE, END], Fault.ALTERED, "chunks and sample have other tokens"
    ),
    "other text": (replaced(3, sample(text="xxy")), Fault.ALTERED, "have other text"),
    "other log-probability in a chunk": (
        replaced(1, WHOLE[1] | {"logprobs": [-1.001]}), Fault.ALTERED, "other log-probabilities"
    ),
    "no reason": (
        replaced(3, sample(finish_reason="FINISH_REASON_UNSPECIFIED")),
        Fault.ALTERED,
        "no finish reason",
    ),
    "more than was asked for": (
        replaced(0, SENT | {"max_tokens": 2}), Fault.ALTERED, "more tokens than were asked for"
    ),
    "Usage of another": (
        replaced(4, USAGE | {"request_id": "b"}), Fault.ALTERED, "Usage is of 'b' with seed 1"
    ),
    "other seed": (replaced(4, USAGE | {"seed": 2}), Fault.ALTERED, "with seed 2"),
    "other count": (
        replaced(4, USAGE | {"completion_tokens": {"student": 2}}),
        Fault.ALTERED,
        "Usage counts tokens {'student': 2}, its samples have {'student': 3}",
    ),
    "no probability": (
        replaced(3, sample(divergence={**DIVERGENCE, "reference_logprobs": [-1, math.nan, -1]})),
        Fault.ALTERED,
        "a reference log-probability is none",
    ),
    "never sent": (WHOLE[1:], Fault.ALTERED, "never sent"),
    "other chunk": (replaced(1, tokens(0, 6)), Fault.ALTERED, "chunks and sample have other"),
    "logprob missing": (
        [
            SENT, WHOLE[1], WHOLE[2] | {"logprobs": []}, sample(logprobs=[-1.0]), USAGE, END,
        ],
        Fault.ALTERED,
        "not one log-probability for each",
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
    return [e | {"id": "b"} for e in (SENT, sample(**fields), USAGE, END)]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"token_ids": [7, 8, 5]}, "other tokens than without faults"),
        ({"token_ids": [7, 8, 9, 1], "logprobs": [*LOGPROBS, -1.0]}, "other tokens than"),
        (
            {"finish_reason": "FINISH_REASON_LENGTH"},
            "FINISH_REASON_STOP, without faults FINISH_REASON_LENGTH",
        ),
        ({"logprobs": [-1.0, -0.5, -2.1]}, "log-probability -2.0, without faults -2.1"),
        ({"text": "xyz"}, "text xxx, without faults xyz"),
        ({"answer": "4"}, "answer None, without faults 4"),
        (
            {"divergence": {**DIVERGENCE, "reference_logprobs": [-0.5, -0.75, -2.1]}},
            "log-probability -2.0, without faults -2.1",
        ),
        ({"divergence": {**DIVERGENCE, "k1_sum": 1.0}}, "k1_sum is -0.25, without faults 1.0"),
    ],
)
def test_other_answer_than_without_faults_is_altered(fields: dict[str, Any], text: str) -> None:
    ledger = check(WHOLE, other_run(**fields))
    assert [v.fault for v in ledger.violations] == [Fault.ALTERED]
    assert text in ledger.violations[0].text


def test_what_is_missing_of_a_sample_is_lost() -> None:
    """With and without: what was there without faults has to come, or a reason."""
    bare = [e | {"logprobs": []} if "logprobs" in e else e for e in WHOLE]
    bare[3] = sample(logprobs=[], divergence=None)
    texts = [violation.text for violation in check(bare, other_run()).violations]
    assert [t.partition(": ")[2] for t in texts] == [
        "log-probabilities did not come",
        "the divergence did not come, and no reason",
    ]
    bare[3] |= {"divergence_error": "the other model failed"}
    assert len(check(bare, other_run()).violations) == 1


def test_reference_that_says_nothing_is_told() -> None:
    (violation,) = check(WHOLE, []).violations
    assert "the reference has none of these samples" in violation.text
    other = [e | {"id": "c"} for e in other_run(token_ids=[7, 8, 5])]
    found = [v.request_id for v in check(WHOLE, [*other_run(), *other]).violations]
    assert found == ["c of the reference"]


def test_early_samples_of_good_calls_are_counted() -> None:
    early = replaced(3, sample(finish_reason="FINISH_REASON_DEADLINE"))
    assert (check(early).num_early, check(WHOLE).num_early) == (1, 0)


def voted(answers: tuple[str, ...], /, **changes: Any) -> Events:
    """A request whose samples have answers, and its votes, right but for `changes`."""
    sent = SENT | {"num_samples": len(answers), "streams": False, "vote": "exact"}
    vote = {"answer": "4", "share": 2 / 3, "num_valid": 3, "num_samples": 3, "tie": False}
    samples = [
        sample(index, answer=answer, role=role)
        for role in ("student", "teacher")
        for index, answer in enumerate(answers)
    ]
    found = AGREEMENT | {
        "student": vote, "teacher": vote, "same_answer": True,
        "student_pass_at_k": {"1": 2 / 3}, "teacher_pass_at_k": {"1": 2 / 3}, **changes,
    }  # fmt: skip
    counts = {"student": 9, "teacher": 9}
    usage = USAGE | {"completion_tokens": counts}
    return [sent | {"roles": ["student", "teacher"]}, *samples, found, usage, END]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"student": None}, "same_answer is True, the votes give None"),
        ({"same_answer": False}, "same_answer is False, the votes give True"),
        ({"student_pass_at_k": {"1": 0.5}}, "student pass@1 is 0.5, its answers give 0.666"),
        ({"student_pass_at_k": {"4": 1.0}}, "student pass@4 is 1.0, its answers give None"),
    ],
)
def test_votes_follow_from_the_answers(changes: dict[str, Any], text: str) -> None:
    answers = ("4", "4", "5")
    assert check(voted(answers)).violations == []
    assert [text in v.text for v in check(voted(answers, **changes)).violations] == [True]
    (_, *others) = check(voted(("5", "5", "4"))).violations
    assert any("vote: answer is 4, its answers give 5" in v.text for v in others)


def test_model_that_was_not_asked_has_no_vote() -> None:
    events = voted(("4", "4", "5"))
    events[0] |= {"roles": ["student"]}
    assert "teacher vote: it was not asked" in [v.text for v in check(events).violations]


def test_agreement_comes_once() -> None:
    events = voted(("4", "4", "5"))
    at = events.index(next(e for e in events if e["event"] == "agreement"))
    (lost,) = check([*events[:at], *events[at + 1 :]]).violations
    assert lost.text == "the agreement did not come"
    (twice,) = check([*events[:at], events[at], *events[at:]]).violations
    assert twice.text == "the agreement came 2 times"


def test_event_of_no_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="no kind of event: 'tokenz'"):
        check([event("tokenz")])


@pytest.mark.parametrize(("newest", "is_balanced"), [(8, True), (5, False)])
def test_cancelled_call_has_a_beginning_of_the_answer(newest: int, is_balanced: bool) -> None:
    cancelled = [SENT, tokens(0, 7, newest), event("end", code="CANCELLED")]
    ledger = check(cancelled, other_run())
    assert (ledger.is_balanced, ledger.num_compared) == (is_balanced, 1)


def test_sample_that_ended_early_has_a_beginning_of_the_answer() -> None:
    early = {"finish_reason": "FINISH_REASON_DEADLINE", "divergence": None}
    for ids, is_balanced in (([7, 8], True), ([8], False), ([7, 8, 9, 9], False)):
        part = sample(**early, token_ids=ids, logprobs=LOGPROBS[: len(ids)])
        usage = USAGE | {"completion_tokens": {"student": len(ids)}}
        history = [SENT | {"streams": False}, part | {"logprobs": []}, usage, END]
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
