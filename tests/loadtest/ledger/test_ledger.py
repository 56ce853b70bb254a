"""The ledger against histories that are broken in one place each."""

from __future__ import annotations

import math
from typing import Any

import pytest

from loadtest.ledger.ledger import Fault, check, render
from tests.support.loadtest.histories import (
    DIVERGENCE,
    END,
    LOGPROBS,
    SENT,
    USAGE,
    WHOLE,
    Events,
    event,
    replaced,
    sample,
    tokens,
)


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
