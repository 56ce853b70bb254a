from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bundle.errors import UserError
from loadtest.config import RunConfig
from loadtest.records import DatasetPrompt, Phase, PlannedRequest
from loadtest.workload.schedule import Block, Schedule, plan

PROMPTS = [
    DatasetPrompt(f"p{index}", f"What is {index} + 1?", str(index + 1)) for index in range(7)
]


def make_config(**changes: Any) -> RunConfig:
    defaults = {"rates_rps": (4.0,), "duration_s": 12.0, "warmup_s": 3.0, "out": Path("run")}
    return RunConfig(**{**defaults, **changes})


def make_plan(**changes: Any) -> Schedule:
    return plan(make_config(**changes), PROMPTS)


def measured(schedule: Schedule) -> list[Block]:
    return [block for block in schedule.blocks if block.phase is Phase.MEASURED]


open_loops = st.fixed_dictionaries(
    {
        "arrival": st.sampled_from(["poisson", "constant"]),
        "rates_rps": st.lists(st.floats(0.5, 20), min_size=1, max_size=3, unique=True).map(tuple),
        "arms": st.sampled_from([("student",), ("student", "teacher"), ("a", "b", "c")]),
        "duration_s": st.floats(10, 30),
        "warmup_s": st.sampled_from([0.0, 2.0, 7.5]),
        "block_s": st.floats(0.5, 40),
        "gap_s": st.sampled_from([0.0, 0.25, 1.0]),
        "seed": st.integers(0, 2**63 - 1),
    }
)
each_plan = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@each_plan
@given(open_loops)
def test_blocks_follow_each_other_with_the_gap_between(changes: dict[str, Any]) -> None:
    blocks = make_plan(**changes).blocks
    assert blocks[0].start_s == 0
    for block, later in itertools.pairwise(blocks):
        assert later.start_s == pytest.approx(block.end_s + changes["gap_s"])
        assert later.index == block.index + 1


@each_plan
@given(open_loops)
def test_each_request_is_due_within_its_block_and_after_the_one_before(
    changes: dict[str, Any],
) -> None:
    schedule = make_plan(**changes)
    for block in schedule.blocks:
        times_s = [request.intended_s for request in block.requests]
        assert times_s == sorted(times_s)
        assert all(block.start_s <= time_s <= block.end_s for time_s in times_s)
        assert {(request.block, request.arm) for request in block.requests} <= {
            (block.index, block.arm)
        }
    assert [request.number for request in schedule.requests] == list(range(len(schedule.requests)))


@each_plan
@given(open_loops)
def test_pairs_differ_in_their_arm_alone(changes: dict[str, Any]) -> None:
    schedule = make_plan(**changes)
    starts_s = [block.start_s for block in schedule.blocks]
    pairs = defaultdict(list)
    for request in schedule.requests:
        pairs[request.pair].append(request)
    for requests in pairs.values():
        assert sorted(request.arm for request in requests) == sorted(changes["arms"])
        assert len({(r.prompt_id, r.seed, r.phase, r.load) for r in requests}) == 1
        offsets_s = [r.intended_s - starts_s[r.block] for r in requests]
        assert max(offsets_s) - min(offsets_s) < 1e-6


@each_plan
@given(open_loops)
def test_each_load_lasts_as_long_for_each_arm(changes: dict[str, Any]) -> None:
    lasted_s: Counter[tuple[str, float]] = Counter()
    for block in measured(make_plan(**changes)):
        assert block.end_s - block.start_s <= changes["block_s"] + 1e-6
        lasted_s[block.arm, block.load] += block.end_s - block.start_s
    cells = {(arm, rate) for arm in changes["arms"] for rate in changes["rates_rps"]}
    assert set(lasted_s) == cells
    assert all(length_s == pytest.approx(changes["duration_s"]) for length_s in lasted_s.values())


@each_plan
@given(st.integers(0, 2**63 - 1), st.floats(5, 50))
def test_poisson_rate_is_the_asked_one_within_chance(seed: int, rate_rps: float) -> None:
    """Six standard deviations of a Poisson count."""
    schedule = make_plan(seed=seed, rates_rps=(rate_rps,), duration_s=20.0, warmup_s=0.0)
    counts = Counter(request.arm for request in schedule.requests)
    mean = rate_rps * 20
    assert all(abs(count - mean) < 6 * mean**0.5 for count in counts.values())


@each_plan
@given(open_loops)
def test_same_seed_gives_the_same_schedule(changes: dict[str, Any]) -> None:
    assert make_plan(**changes) == make_plan(**changes)
    other = make_plan(**{**changes, "seed": changes["seed"] ^ 1})
    assert other.sha256 != make_plan(**changes).sha256


def test_rates_are_visited_upwards_behind_a_warm_up_at_the_lowest() -> None:
    schedule = make_plan(rates_rps=(4.0, 1.0, 2.0))
    visited = [(block.phase, block.load) for block in schedule.blocks]
    assert list(dict.fromkeys(visited)) == [
        (Phase.WARMUP, 1.0),
        (Phase.MEASURED, 1.0),
        (Phase.MEASURED, 2.0),
        (Phase.MEASURED, 4.0),
    ]
    assert schedule.loads == (1.0, 2.0, 4.0)
    assert schedule.duration_s == schedule.blocks[-1].end_s


def test_blocks_are_as_long_as_asked_or_shorter_so_that_they_are_equal() -> None:
    lengths_s = [b.end_s - b.start_s for b in measured(make_plan(duration_s=12.0, block_s=5.0))]
    assert lengths_s == pytest.approx([4.0] * 6)


def test_arms_take_turns_in_rounds_of_both_orders() -> None:
    arms = [block.arm for block in measured(make_plan(duration_s=100.0))]
    rounds = list(zip(arms[::2], arms[1::2], strict=True))
    assert set(rounds) == {("student", "teacher"), ("teacher", "student")}


def test_prompts_are_asked_equally_often_and_in_the_same_order_at_all_loads() -> None:
    schedule = make_plan(arms=("student",), rates_rps=(1.0, 2.0), arrival="constant")
    asked: dict[float, list[str]] = {
        load: [r.prompt_id for b in measured(schedule) if b.load == load for r in b.requests]
        for load in schedule.loads
    }
    assert asked[2.0][: len(asked[1.0])] == asked[1.0]
    assert set(Counter(asked[2.0][:21]).values()) == {3}
    assert asked[2.0][:7] != asked[2.0][7:14]


def test_seeds_repeat_for_the_other_arms_of_a_pair_only() -> None:
    schedule = make_plan(rates_rps=(2.0, 4.0))
    assert set(Counter(request.seed for request in schedule.requests).values()) == {2}


def test_loads_beside_a_load_leave_it_as_it_is() -> None:
    def sent(schedule: Schedule) -> list[Any]:
        starts_s = [block.start_s for block in schedule.blocks]
        return [
            (r.arm, r.prompt_id, r.seed, round(r.intended_s - starts_s[r.block], 6))
            for block in measured(schedule)
            if block.load == 4.0
            for r in block.requests
            if r.intended_s is not None
        ]

    assert sent(make_plan(rates_rps=(4.0,))) == sent(make_plan(rates_rps=(1.0, 4.0)))


def test_sources_of_chance_are_independent() -> None:
    """Arrivals of another kind leave prompts, the arms' order and the seeds of sampling alone."""

    def drawn(schedule: Schedule) -> list[Any]:
        blocks = measured(schedule)
        return [[b.arm for b in blocks], [(r.prompt_id, r.seed) for r in blocks[0].requests][:8]]

    assert drawn(make_plan()) == drawn(make_plan(arrival="constant"))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 65},
        {"num_samples": 2},
        {"temperature": 0.5},
        {"arms": ("teacher", "student")},
        {"gap_s": 2.0},
        {"warmup_s": 0.0},
        {"arrival": "constant"},
    ],
)
def test_hash_changes_with_what_is_sent(changes: dict[str, Any]) -> None:
    assert make_plan(**changes).sha256 != make_plan().sha256


def test_hash_changes_with_the_text_of_a_prompt() -> None:
    other = [DatasetPrompt("p0", "What is 1 + 0?", "1"), *PROMPTS[1:]]
    assert plan(make_config(), other).sha256 != make_plan().sha256


@pytest.mark.parametrize(
    "changes", [{"target": "elsewhere:1"}, {"out": Path("b")}, {"slo": "e2e_p50=1"}]
)
def test_hash_is_not_of_where_a_run_goes(changes: dict[str, Any]) -> None:
    assert make_plan(**changes).sha256 == make_plan().sha256


def test_trace_is_played_over_the_blocks_as_it_is(tmp_path: Path) -> None:
    trace = tmp_path / "times.txt"
    trace.write_text("0.5\n3.25\n3.5\n5.75\n6.0\n")
    schedule = make_plan(
        arrival="trace", trace=trace, duration_s=6.0, warmup_s=0.0, block_s=3.0, gap_s=1.0
    )
    played = defaultdict(list)
    for block in schedule.blocks:
        played[block.arm] += [(block.index // 2, r.intended_s) for r in block.requests]
    starts_s = {arm: [b.start_s for b in schedule.blocks if b.arm == arm] for arm in played}
    for arm, times in played.items():
        load_times_s = [time_s - starts_s[arm][index] + 3 * index for index, time_s in times]
        assert load_times_s == pytest.approx([0.5, 3.25, 3.5, 5.75])
    assert schedule.loads == (4 / 6,)


def test_closed_loop_has_lists_that_no_client_can_finish() -> None:
    schedule = make_plan(
        arrival="closed", concurrency=(2, 1, 100), duration_s=1.0, warmup_s=0.0, block_s=0.5
    )
    counts = {block.load: len(block.requests) for block in schedule.blocks}
    assert counts == {1.0: 100, 2.0: 200, 100.0: 1000}
    first, second = schedule.blocks[:2]
    assert [_sent(r) for r in first.requests] == [_sent(r) for r in second.requests]
    assert all(r.intended_s is None and r.rate_rps is None for r in schedule.requests)
    assert {r.concurrency for r in first.requests} == {1}


def _sent(request: PlannedRequest) -> tuple[int, str, int]:
    return request.pair, request.prompt_id, request.seed


def test_load_that_sends_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"at 0\.001 requests per second nothing is sent in 12 s"):
        make_plan(rates_rps=(0.001,))


def test_schedule_needs_a_prompt() -> None:
    with pytest.raises(AssertionError, match="at least one prompt"):
        plan(make_config(), [])
