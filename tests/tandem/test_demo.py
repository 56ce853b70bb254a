from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bundle.errors import UserError
from loadtest.server_metrics import Scrape
from protos.tandem.v1 import inference_pb2 as pb
from tandem import demo
from tandem.demo import compare_with_responses, expected_metrics, outcome_of, serving


def sample(role: int, num_tokens: int, k3_sum: float, **fields: Any) -> pb.Sample:
    divergence = pb.Divergence(k3_sum=k3_sum, num_tokens=num_tokens)
    settings = {"finish_reason": pb.FINISH_REASON_STOP, "divergence": divergence} | fields
    return pb.Sample(role=role, token_ids=range(num_tokens), **settings)


def make_responses() -> list[pb.CompareResponse]:
    """Two questions: one without answers, one with votes that agree."""
    vote = pb.Vote(answer="9", share=1.0, num_valid=2, num_samples=2)
    free = pb.CompareResponse(
        samples=[sample(pb.ROLE_STUDENT, 5, 0.5), sample(pb.ROLE_TEACHER, 4, 0.25)]
    )
    judged = pb.CompareResponse(
        samples=[
            sample(pb.ROLE_STUDENT, 3, 0.125, finish_reason=pb.FINISH_REASON_LENGTH),
            sample(pb.ROLE_TEACHER, 2, 0.0),
        ],
        agreement=pb.Agreement(
            student=vote,
            teacher=vote,
            same_answer=True,
            student_pass_at_k={1: 0.5, 8: 1.0},
            teacher_pass_at_k={1: 0.75, 8: 1.0},
        ),
    )
    return [free, judged]


def series(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return f"tandem_{name}", frozenset(labels.items())


def make_metrics() -> demo.Series:
    """What a server counts for `make_responses`; labels that the demo ignores are there, too."""
    task = {"task": "other"}
    k3 = {"estimator": "k3", "task": "other"}
    gold = {"reference": "gold", "task": "other"}
    return {
        series("samples_total", role="student", finish_reason="stop"): 1,
        series("samples_total", role="student", finish_reason="length"): 1,
        series("samples_total", role="student", finish_reason="error"): 0,
        series("samples_total", role="teacher", finish_reason="stop"): 2,
        series("generation_tokens_total", role="student"): 8,
        series("generation_tokens_total", role="teacher"): 6,
        series("divergence_nats_sum_total", policy="student", **k3): 0.625,
        series("divergence_nats_sum_total", policy="teacher", **k3): 0.25,
        series("divergence_tokens_total", policy="student", **k3): 8,
        series("divergence_tokens_total", policy="teacher", **k3): 6,
        series("consensus_total", outcome="agree", **task): 1,
        series("pass_at_k_sum_total", role="student", k="1", **gold): 0.5,
        series("pass_at_k_sum_total", role="student", k="8", **gold): 1.0,
        series("pass_at_k_sum_total", role="teacher", k="1", **gold): 0.75,
        series("pass_at_k_sum_total", role="teacher", k="8", **gold): 1.0,
        series("requests_total", rpc="Compare", code="OK", route="both", **task): 2,
    }


# --- metrics against answers


def test_metrics_that_say_what_the_answers_say_have_no_differences() -> None:
    assert compare_with_responses(make_metrics(), make_responses()) == []


def checked_series() -> list[Any]:
    return [key for key in make_metrics() if key[0] != "tandem_requests_total"]


@pytest.mark.parametrize("key", checked_series(), ids=lambda k: f"{k[0]}-{sorted(k[1])[-1][1]}")
@pytest.mark.parametrize("change", [1.0, -0.125])
def test_wrong_counter_is_noticed(key: Any, change: float) -> None:
    metrics = make_metrics()
    metrics[key] += change
    (difference,) = compare_with_responses(metrics, make_responses())
    assert difference.startswith(f"{key[0]}{{")


@pytest.mark.parametrize("key", [key for key, value in make_metrics().items() if value][:-1])
def test_missing_counter_is_noticed(key: Any) -> None:
    metrics = make_metrics()
    del metrics[key]
    (difference,) = compare_with_responses(metrics, make_responses())
    assert " is 0, the answers say " in difference


@pytest.mark.parametrize(
    "key",
    [
        series("samples_total", role="teacher", finish_reason="shutdown"),
        series("consensus_total", outcome="no_majority", task="other"),
        series("pass_at_k_sum_total", role="student", k="4", reference="gold", task="other"),
    ],
)
def test_counter_of_what_no_answer_said_is_noticed(key: Any) -> None:
    assert len(compare_with_responses(make_metrics() | {key: 1.0}, make_responses())) == 1


def test_missing_answer_is_noticed() -> None:
    assert compare_with_responses(make_metrics(), make_responses()[:1]) != []


def test_exact_divergences_are_not_mistaken_for_k3() -> None:
    exact = series("divergence_nats_sum_total", estimator="exact", policy="student", task="other")
    assert compare_with_responses(make_metrics() | {exact: 5.0}, make_responses()) == []


def test_rounding_is_no_difference() -> None:
    metrics = {key: value * (1 + 1e-9) for key, value in make_metrics().items()}
    assert compare_with_responses(metrics, make_responses()) == []


def test_tokens_without_a_finite_estimate_are_not_in_the_sums() -> None:
    """The server's counter is of the tokens that its sum is over."""
    divergence = pb.Divergence(k3_sum=0.5, num_tokens=5, nonfinite_tokens=2)
    response = pb.CompareResponse(samples=[sample(pb.ROLE_STUDENT, 5, 0.5, divergence=divergence)])
    tokens = series("divergence_tokens_total", estimator="k3", policy="student")
    assert expected_metrics([response])[tokens] == 3


def test_sample_without_a_divergence_adds_none() -> None:
    response = pb.CompareResponse(samples=[pb.Sample(role=pb.ROLE_TEACHER, token_ids=[1, 2])])
    expected = expected_metrics([response])
    assert expected[series("generation_tokens_total", role="teacher")] == 2
    assert not expected[series("divergence_tokens_total", estimator="k3", policy="teacher")]


# --- outcome of two votes

SURE = pb.Vote(answer="9", num_valid=2)
TIED = pb.Vote(tie=True, num_valid=2)
EMPTY = pb.Vote(num_valid=0)


@pytest.mark.parametrize(
    ("student", "teacher", "same_answer", "outcome"),
    [
        (SURE, SURE, True, "agree"),
        (SURE, pb.Vote(answer="8", num_valid=1), False, "disagree"),
        (SURE, TIED, None, "no_majority"),
        (TIED, TIED, None, "no_majority"),
        (SURE, EMPTY, None, "invalid"),
        (EMPTY, TIED, None, "invalid"),
    ],
)
def test_outcome_of_two_votes(
    student: pb.Vote, teacher: pb.Vote, same_answer: bool | None, outcome: str
) -> None:
    agreement = pb.Agreement(student=student, teacher=teacher)
    if same_answer is not None:
        agreement.same_answer = same_answer
    assert outcome_of(agreement) == outcome


def test_model_without_a_vote_makes_no_outcome() -> None:
    """The server compares two votes or none: a model that failed has none."""
    response = pb.CompareResponse(agreement=pb.Agreement(student=SURE))
    expected = expected_metrics([response])
    assert not any(value for (name, _), value in expected.items() if "consensus" in name)


# --- the metrics page


def test_demo_fails_when_the_metrics_are_not_what_the_answers_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ready = {"address": "a:1", "metrics_url": "m"}
    monkeypatch.setattr("export.run.recipe.load_config", lambda recipe: None)
    monkeypatch.setattr("export.pipeline.run_export", lambda config, reporter: tmp_path)
    monkeypatch.setattr(demo, "show_bundle", lambda console, bundle: None)
    monkeypatch.setattr(demo, "serving", lambda bundle: contextlib.nullcontext(ready))
    monkeypatch.setattr(demo, "ask_all", lambda console, address: make_responses()[:1])
    monkeypatch.setattr(demo, "scrape", lambda url: Scrape(make_metrics()))
    with pytest.raises(UserError, match=r"not what the answers said: .*tandem_consensus_total"):
        demo.demo()
    assert "tandem_pass_at_k_sum_total{" in capsys.readouterr().out


# --- the server's process


def test_server_that_cannot_start_is_an_error_with_its_words(tmp_path: Path) -> None:
    message = r"(?s)did not become ready: .*is not a bundle"
    with pytest.raises(UserError, match=message), serving(tmp_path):
        pytest.fail("there is nothing to serve")


@pytest.fixture
def fake_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a shell script in the place of `tandem serve`; returns the file with its process id."""

    def install(script: str) -> Path:
        executable, pid_file = tmp_path / "server", tmp_path / "pid"
        executable.write_text(
            f"#!/bin/sh\necho $$ > {pid_file}\n{script.splitlines()[0]}\n"
            "for ready_file; do :; done\n"
            'echo \'{"address": "a:1", "metrics_url": "m"}\' > "$ready_file.tmp"\n'
            f'mv "$ready_file.tmp" "$ready_file"\n{script.splitlines()[1]}\n'
        )
        executable.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(executable))
        return pid_file

    return install


def test_server_is_told_to_stop_and_its_addresses_are_given(
    fake_server: Callable[[str], Path], tmp_path: Path
) -> None:
    fake_server("trap 'exit 0' TERM\nwhile :; do sleep 0.02; done")
    with serving(tmp_path) as ready:
        assert ready == {"address": "a:1", "metrics_url": "m"}


def test_server_that_ends_badly_is_an_error(
    fake_server: Callable[[str], Path], tmp_path: Path
) -> None:
    fake_server("trap 'echo too bad; exit 7' TERM\nwhile :; do sleep 0.02; done")
    with pytest.raises(UserError, match="ended with exit code 7: too bad"), serving(tmp_path):
        pass


def test_server_is_stopped_when_the_caller_fails(
    fake_server: Callable[[str], Path], tmp_path: Path
) -> None:
    pid_file = fake_server("trap 'exit 0' TERM\nwhile :; do sleep 0.02; done")
    with pytest.raises(ZeroDivisionError), serving(tmp_path):
        raise ZeroDivisionError
    assert not Path(f"/proc/{pid_file.read_text().strip()}").exists()


def test_server_that_does_not_stop_is_killed(
    fake_server: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "STOP_TIMEOUT_S", 0.1)
    pid_file = fake_server("trap '' TERM\nexec sleep 60")
    with pytest.raises(UserError, match=r"did not stop within 0\.1 s"), serving(tmp_path):
        pass
    assert not Path(f"/proc/{pid_file.read_text().strip()}").exists()
