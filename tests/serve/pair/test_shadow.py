"""Shadows: scored behind the answer, for the metrics alone, and never in the answer's way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from protos.tandem.v1 import inference_pb2 as pb
from serve.pair.served import Role

SHADOWED = {"route": pb.ROUTE_AUTO, "divergence": pb.DivergenceOptions(enabled=False)}


def answer(live: Any, **fields: Any) -> list[pb.Sample]:
    request = pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(max_tokens=8), **fields)
    return list(live.client.generate(request).result().samples)


def shadows(live: Any) -> dict[str, int]:
    outcomes = ("compared", "dropped", "error", "deadline")
    counts = {o: int(live.pair.value("shadow_total", outcome=o)) for o in outcomes}
    return {outcome: count for outcome, count in counts.items() if count}


def wait_for_shadows(live: Any, count: int) -> dict[str, int]:
    until_s = time.monotonic() + 60
    while sum(shadows(live).values()) < count and time.monotonic() < until_s:
        time.sleep(0.005)
    return shadows(live)


@contextmanager
def held(live: Any, role: Role) -> Iterator[None]:
    """Let a model answer nobody during the block."""
    live.pair.backends[role].may_run.clear()
    try:
        yield
    finally:
        live.pair.backends[role].may_run.set()


def test_shadow_counts_the_divergence_that_scoring_gives(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(), shadow_rate=1) as live:
        (sample,) = answer(live, **SHADOWED)
        assert not sample.HasField("divergence") and not sample.divergence_error
        assert wait_for_shadows(live, 1) == {"compared": 1}
        labels = {"estimator": "k3", "policy": "student", "task": "other"}
        counted = live.pair.value("divergence_nats_sum_total", **labels)
        num_tokens = live.pair.value("divergence_tokens_total", **labels)
        score = live.client.score(
            pb.ScoreRequest(
                prompt="x",
                completions=[pb.Completion(token_ids=pb.TokenIds(ids=sample.token_ids))],
            )
        ).scores[0]
    assert num_tokens == len(sample.token_ids)
    assert counted == pytest.approx(score.divergence.k3_sum, abs=1e-9)


@pytest.mark.parametrize(
    "fields",
    [
        {"route": pb.ROUTE_AUTO},
        {"route": pb.ROUTE_STUDENT, "divergence": pb.DivergenceOptions(enabled=False)},
    ],
)
def test_compared_and_routed_requests_have_no_shadow(
    serving: Any, make_pair: Any, fields: dict[str, Any]
) -> None:
    with serving(make_pair(), shadow_rate=1) as live:
        answer(live, **fields)
        assert live.control.status().num_shadows == 0
        assert shadows(live) == {}


def test_without_a_rate_there_are_no_shadows(serving: Any, make_pair: Any) -> None:
    with serving(make_pair()) as live:
        answer(live, **SHADOWED)
        assert live.control.status().num_shadows == 0
        assert shadows(live) == {}


def test_reference_that_hangs_delays_no_answer_and_later_shadows_are_dropped(
    serving: Any, make_pair: Any
) -> None:
    with serving(make_pair(), shadow_rate=1, max_shadows=2) as live, held(live, Role.TEACHER):
        for _ in range(5):
            (sample,) = answer(live, **SHADOWED)
            assert sample.finish_reason in (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)
        assert live.control.status().num_shadows == 2
        assert shadows(live) == {"dropped": 3}
        live.pair.backends[Role.TEACHER].may_run.set()
        assert wait_for_shadows(live, 5) == {"dropped": 3, "compared": 2}


def test_reference_that_fails_fails_no_answer(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(), shadow_rate=1) as live:
        live.pair.backends[Role.TEACHER].error = RuntimeError("broken on purpose")
        (sample,) = answer(live, **SHADOWED)
        assert not sample.divergence_error
        assert wait_for_shadows(live, 1) == {"error": 1}


def test_shadow_asks_nothing_of_the_model_that_answered(serving: Any, make_pair: Any) -> None:
    wishes = pb.DivergenceOptions(enabled=False, exact=True)
    with serving(make_pair(), shadow_rate=1) as live:
        answer(live, route=pb.ROUTE_AUTO, divergence=wishes)
        assert wait_for_shadows(live, 1) == {"compared": 1}
        steps = {
            role: live.pair.value("engine_step_seconds_count", role=role, phase="score")
            for role in ("student", "teacher")
        }
    assert steps["student"] == 0 < steps["teacher"]


def test_shadow_that_takes_too_long_is_given_up(serving: Any, make_pair: Any) -> None:
    settings = {"shadow_rate": 1, "shadow_timeout_s": 0.05}
    with serving(make_pair(), **settings) as live, held(live, Role.TEACHER):
        answer(live, **SHADOWED)
        assert wait_for_shadows(live, 1) == {"deadline": 1}


def test_foreground_scoring_waits_for_one_shadow_at_most(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(), shadow_rate=1) as live:
        with held(live, Role.TEACHER):
            for _ in range(4):
                answer(live, **SHADOWED)
            load = live.pair.engines.teacher.engine.load()
            assert load.num_waiting + load.num_running == 1
        assert wait_for_shadows(live, 4) == {"compared": 4}


def test_drain_drops_shadows(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(), shadow_rate=1) as live:
        with held(live, Role.TEACHER):
            answer(live, **SHADOWED)
            stopping = live.stop_soon()
            assert wait_for_shadows(live, 1) == {"dropped": 1}
        stopping.result(30)
