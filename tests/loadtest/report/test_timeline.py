from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from loadtest.records import Phase, RequestRecord
from loadtest.report.plots import Point, arm_styles
from loadtest.report.timeline import (
    NUM_BINS,
    ArmTurn,
    Gauge,
    draw_timeline,
    in_flight,
    latest_sends,
    load_starts,
    tracks_of,
    turns_of,
)
from tests.support.load_tests import planned, recorded

SVG = "{http://www.w3.org/2000/svg}"


def record(sent_s: float, ended_s: float, due_s: float | None = None, **plan: Any) -> RequestRecord:
    return recorded(planned(intended_s=due_s, **plan), sent_s=sent_s, ended_s=ended_s)


def steps(points: tuple[Point, ...]) -> list[tuple[float, float]]:
    return [(point.x, point.y) for point in points]


def test_in_flight_shows_the_peak_of_a_bin_and_what_it_leaves() -> None:
    records = [record(0.1, 2.5), record(0.2, 0.4), record(0.3, 0.6)]
    assert steps(in_flight(records, bin_s=1.0)) == [(0, 3), (1, 1), (2, 1), (3, 0)]


def test_request_that_ends_as_another_is_sent_is_no_peak() -> None:
    records = [record(0.25, 0.5), record(0.5, 0.75)]
    assert steps(in_flight(records, bin_s=1.0)) == [(0, 1), (1, 0)]


def test_nothing_in_flight_is_no_line() -> None:
    assert in_flight([], bin_s=1.0) == ()


def test_send_lag_is_the_worst_of_each_bin_in_milliseconds() -> None:
    records = [record(0.5, 1, due_s=0.25), record(0.75, 1, due_s=0.625), record(1.5, 2, due_s=1.5)]
    assert steps(latest_sends(records, bin_s=1.0)) == [(0, 250), (1, 0)]


def test_closed_loop_has_no_send_lag() -> None:
    assert latest_sends([record(0.5, 1)], bin_s=1.0) == ()


def test_turn_lasts_from_the_first_request_due_to_the_last() -> None:
    records = [
        record(9.1, 9.5, due_s=9, block=1, arm="teacher"),
        record(2.1, 2.5, due_s=2, phase=Phase.WARMUP),
        record(4.1, 8.5, due_s=4, phase=Phase.WARMUP),
    ]
    assert turns_of(records) == [
        ArmTurn("student", 2, 4, is_warmup=True),
        ArmTurn("teacher", 9, 9),
    ]


def test_load_begins_with_its_first_measured_request() -> None:
    closed = {"rate_rps": None, "concurrency": 4}
    records = [
        record(1, 2, phase=Phase.WARMUP),
        record(4, 5),
        record(3, 5),
        record(8, 9, **closed),
    ]
    assert load_starts(records) == [(3, 1.0), (8, 4)]


def test_line_of_a_long_run_stays_short_and_keeps_its_peak() -> None:
    records = [record(0.01 * i, 0.01 * i + 0.02) for i in range(5000)]
    records += [record(25.0, 25.001) for _ in range(40)]
    (track,) = tracks_of(records, [])
    (curve,) = track.curves
    assert len(curve.points) <= 2 * NUM_BINS + 2
    assert max(point.y for point in curve.points) >= 40


@pytest.mark.parametrize("due_s", [None, 1.0])
@pytest.mark.parametrize("gauges", [[], [Gauge("student", 1.0, 3, 2, 1)]])
def test_rows_are_those_that_there_is_data_for(due_s: float | None, gauges: list[Gauge]) -> None:
    names = [track.y_name for track in tracks_of([record(1, 2, due_s=due_s)], gauges)]
    assert names == (
        ["in flight"]
        + ["send lag, ms"] * (due_s is not None)
        + ["server: waiting", "server: running"] * bool(gauges)
    )


def test_timeline_names_loads_arms_and_what_the_server_said() -> None:
    records = [record(1, 2, due_s=1), record(6, 7, due_s=6, block=1, arm="teacher")]
    warm_up = ArmTurn("student", 0.0, 0.5, is_warmup=True)
    gauges = [Gauge("student", 0.5 * i, i, 2 * i, i) for i in range(9)]
    svg = draw_timeline(
        tracks_of(records, gauges),
        [warm_up, *turns_of(records)],
        [(1.0, "2 rps")],
        arm_styles(("student", "teacher")),
    )
    texts = {element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")}
    assert {"2 rps", "student", "teacher", "warm-up", "running", "batch"} <= texts
    assert svg.count("opacity: 0.13") >= 3 * 4, "a shade per turn in each of the rows"
