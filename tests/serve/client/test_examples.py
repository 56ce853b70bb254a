"""Each script of examples/ shows what it promises, run against a real server over tiny models."""

from __future__ import annotations

import ast
import json
import math
import re
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from protos.tandem.v1 import inference_pb2 as pb
from serve.client import Client, ControlClient
from serve.pair.served import Role

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
TEXTS = [{"prompt": "12", "completion": "345"}, {"prompt": "6", "completion": "78"}]
QUICK = ("--min-tokens", "20", "--step-timeout-s", "20", "--shadow-rate", "1")


@contextmanager
def started(name: str, target: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(EXAMPLES / name), "--target", target, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def run(name: str, target: str, *arguments: str, tasks: object = ()) -> tuple[int, str, str]:
    """Return exit status, output and errors of a script whose input is a line of JSON per task."""
    lines = "".join(json.dumps(task) + "\n" for task in tasks)
    with started(name, target, *arguments) as process:
        output, errors = process.communicate(lines, timeout=60)
    return process.returncode, output, errors


def test_compare_shows_k3_per_sample_and_the_verdict(
    serving: Any, make_pair: Any, continuing_with: Any
) -> None:
    # The chat template ends with a new line.
    with serving(make_pair(continuing_with("\n12"), continuing_with("\n34"))) as live:
        status, output, errors = run("compare.py", live.server.address, "6 + 6?")
    assert (status, errors) == (0, "")
    *samples, verdict = output.splitlines()
    assert [re.sub(r"k3 \d+\.\d{4} ", "k3 K ", line) for line in samples[::2]] == [
        f"ROLE_{role} {i}: k3 K over 3 tokens" for role in ("STUDENT", "TEACHER") for i in range(4)
    ]
    assert samples[1::2] == ["  '12'"] * 4 + ["  '34'"] * 4
    assert verdict == "different answers: student 12, teacher 34"


def test_compare_says_why_a_divergence_is_missing(
    serving: Any, make_pair: Any, continuing_with: Any
) -> None:
    pair = make_pair(continuing_with("\n12"))
    pair.backends[Role.TEACHER].error = RuntimeError("broken")
    with serving(pair) as live:
        status, output, _ = run("compare.py", live.server.address, "6 + 6?", "--num-samples", "1")
    student, text, teacher, _, verdict = output.splitlines()
    assert status == 0
    assert text == "  '12'"
    assert student.startswith("ROLE_STUDENT 0: no k3: ")
    assert teacher.startswith("ROLE_TEACHER 0: no k3: ")
    assert verdict == "no verdict: a model has no majority answer"


def test_stream_shows_the_text_and_k3_of_each_token(
    serving: Any, make_pair: Any, continuing_with: Any
) -> None:
    with serving(make_pair(continuing_with("\n12é"))) as live:
        status, output, errors = run("stream.py", live.server.address, "Count.")
    assert (status, errors) == (0, "")
    text, reason, *rows, total = output.splitlines()
    assert (text, reason) == ("12é", "[FINISH_REASON_STOP]")
    values, pieces = zip(*(row.split() for row in rows), strict=True)
    assert [ast.literal_eval(piece) for piece in pieces] == ["1", "2", "", "é", ""]
    assert all(float(value) > 0 for value in values)
    assert float(total.split()[0]) == pytest.approx(sum(map(float, values)), abs=1e-3)


def test_score_shows_exact_kl_beside_k3(live: Any) -> None:
    status, output, errors = run("score.py", live.server.address, tasks=TEXTS)
    assert (status, errors) == (0, "")
    header, *rows = output.splitlines()
    assert header.split() == ["policy", "tokens", "exact", "k3", "ln", "p", "greedy", "completion"]
    found = [row.split() for row in rows]
    assert [(row[0], row[1], row[6]) for row in found] == [
        (role, str(len(text["completion"])), repr(text["completion"]))
        for text in TEXTS
        for role in ("ROLE_STUDENT", "ROLE_TEACHER")
    ]
    assert all(float(row[2]) > 0 and float(row[3]) >= 0 for row in found)
    assert all(float(row[4]) < 0 and row[5] in ("yes", "no") for row in found)


def test_rollouts_are_groups_with_rewards_advantages_and_k3(
    serving: Any, make_pair: Any, continuing_with: Any, tokenizer: Any
) -> None:
    (new_line, five, six) = tokenizer.encode("\n56")
    student = continuing_with("\n5")
    student[new_line, six] = student[new_line, five]  # behind 6 comes the end, as anywhere
    tasks = [{"prompt": "2 + 3", "answer": "5"}, {"prompt": "1 + 1", "answer": "2"}]
    with serving(make_pair(student)) as live:
        status, output, errors = run(
            "grpo_rollouts.py", live.server.address, "--group-size", "32", tasks=tasks
        )
    assert (status, errors) == (0, "")
    rollouts = [json.loads(line) for line in output.splitlines()]
    assert [r["prompt"] for r in rollouts] == ["2 + 3"] * 32 + ["1 + 1"] * 32
    for rollout in rollouts:
        pairs = list(zip(rollout["logprobs"], rollout["reference_logprobs"], strict=True))
        k3 = [math.expm1(reference - policy) - (reference - policy) for policy, reference in pairs]
        assert rollout["k3"] == pytest.approx(k3, abs=1e-9)
        assert len(rollout["completion_token_ids"]) == len(k3)
        assert rollout["prompt_token_ids"][-1] == new_line
        assert rollout["logprobs"][0] == pytest.approx(-math.log(2), abs=1e-6)
    mixed, hopeless = rollouts[:32], rollouts[32:]
    assert [r["reward"] for r in mixed] == [r["completion_token_ids"][0] == five for r in mixed]
    assert statistics.fmean(r["advantage"] for r in mixed) == pytest.approx(0, abs=1e-9)
    assert statistics.pstdev(r["advantage"] for r in mixed) == pytest.approx(1)
    assert {(r["reward"], r["advantage"]) for r in hopeless} == {(0.0, 0.0)}


def test_rollouts_leave_out_a_group_that_the_teacher_did_not_score(
    serving: Any, make_pair: Any, continuing_with: Any
) -> None:
    pair = make_pair(continuing_with("\n5"))
    pair.backends[Role.TEACHER].error = RuntimeError("broken")
    with serving(pair) as live:
        tasks = [{"prompt": "2 + 3", "answer": "5"}]
        status, output, errors = run("grpo_rollouts.py", live.server.address, tasks=tasks)
    assert (status, output, errors) == (0, "", "left out, a sample failed: 2 + 3\n")


@pytest.mark.parametrize(
    ("name", "arguments", "tasks"),
    [
        ("compare.py", ["Hello"], []),
        ("stream.py", ["Hello"], []),
        ("score.py", [], TEXTS),
        ("grpo_rollouts.py", [], [{"prompt": "2 + 3", "answer": "5"}]),
    ],
)
def test_refusal_is_explained_without_a_traceback(
    serving: Any, make_pair: Any, name: str, arguments: list[str], tasks: object
) -> None:
    with serving(make_pair(roles=(Role.TEACHER,))) as live:
        status, _, errors = run(name, live.server.address, *arguments, tasks=tasks)
    assert status == 1
    assert re.match(r"(NOT_FOUND|FAILED_PRECONDITION): ", errors)


@contextmanager
def traffic(target: str) -> Iterator[None]:
    """Clients that leave the choice of the model to the server and ask for no divergence."""
    is_over = threading.Event()
    request = pb.GenerateRequest(prompt="1", divergence=pb.DivergenceOptions(enabled=False))

    def send() -> None:
        with Client(target, timeout_s=30) as client:
            while not is_over.is_set():
                client.generate(request).result()

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def shares_of(output: str) -> list[str]:
    return re.findall(r"^(\d+%) of the traffic to the student: k3 \d+\.\d{4}$", output, re.M)


def policy_of(live: Any) -> tuple[float, float, float]:
    with ControlClient(live.server.control_address, timeout_s=30) as control:
        policy = control.policy()
    return policy.student_weight, policy.teacher_weight, policy.shadow_rate


def test_canary_ends_with_all_traffic_at_the_student(serving: Any, make_pair: Any) -> None:
    settings = {"student_weight": 0.0, "teacher_weight": 1.0, "shadow_rate": 0.25}
    with serving(make_pair(), **settings) as live, traffic(live.server.address):
        arguments = ("--metrics", live.server.metrics_url, "--max-k3", "100", *QUICK)
        status, output, errors = run(
            "canary.py", live.server.control_address, *arguments, "--shares", "0.5", "1"
        )
        policy = policy_of(live)
    assert (status, errors) == (0, "")
    assert shares_of(output) == ["50%", "100%"]
    assert policy == (1.0, 0.0, 0.25)


@pytest.mark.parametrize(
    ("arguments", "shares", "told"),
    [
        (("--max-k3", "1e-6", *QUICK), ["50%"], "k3 is above 1e-06\n"),
        (
            ("--step-timeout-s", "0.1", "--min-tokens", "100000"),
            [],
            "the teacher scored fewer than 100000 tokens in 0.1 s\n",
        ),
        (("--metrics", "http://127.0.0.1:1/metrics"), [], "cannot read the metrics: "),
    ],
    ids=["student strays", "no evidence", "no metrics"],
)
def test_canary_rolls_back(
    serving: Any, make_pair: Any, arguments: tuple[str, ...], shares: list[str], told: str
) -> None:
    settings = {"student_weight": 0.0, "teacher_weight": 2.0}
    with serving(make_pair(), **settings) as live, traffic(live.server.address):
        where = ("--metrics", live.server.metrics_url, "--shares", "0.5", "1")
        status, output, errors = run("canary.py", live.server.control_address, *where, *arguments)
        policy = policy_of(live)
    assert status == 1 and errors.startswith(told)
    assert shares_of(output) == shares
    assert policy == (0.0, 2.0, 0.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_canary_rolls_back(
    serving: Any, make_pair: Any, number: signal.Signals
) -> None:
    with serving(make_pair(), student_weight=0.0, teacher_weight=1.0) as live:
        with ControlClient(live.server.control_address, timeout_s=30) as control:
            arguments = ("--metrics", live.server.metrics_url)
            with started("canary.py", live.server.control_address, *arguments) as process:
                while control.policy().revision == 1:
                    assert process.poll() is None
                process.send_signal(number)
                _, errors = process.communicate(timeout=60)
        policy = policy_of(live)
    assert (process.returncode, errors) == (1, "interrupted\n")
    assert policy == (0.0, 1.0, 0.0)


def test_canary_leaves_a_policy_that_somebody_else_set(serving: Any, make_pair: Any) -> None:
    with (
        serving(make_pair()) as live,
        ControlClient(live.server.control_address, timeout_s=30) as control,
    ):
        arguments = ("--metrics", live.server.metrics_url, "--step-timeout-s", "1")
        with started("canary.py", live.server.control_address, *arguments) as process:
            while control.policy().revision == 1:
                assert process.poll() is None
            control.set_policy(teacher_weight=7)
            _, errors = process.communicate(timeout=60)
        policy = control.policy()
    assert process.returncode == 1
    assert errors.startswith("FAILED_PRECONDITION: expected_revision is 2, ")
    assert (policy.teacher_weight, policy.revision) == (7, 3)
