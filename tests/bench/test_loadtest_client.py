from __future__ import annotations

import os

from bench.loadtest_client import config_of, measure, null_server


def test_both_loops_get_answers_from_the_null_server() -> None:
    with null_server(core=min(os.sched_getaffinity(0))) as target:
        (row,) = measure(config_of(target, 0.2, arrival="constant", rates_rps=(50.0,)))
        (closed,) = measure(config_of(target, 0.2, arrival="closed", concurrency=(2,)))
    assert row["answered_rps"] > 0
    assert 0 <= row["send_lag_p50_ms"] <= row["send_lag_p99_ms"]
    assert row["cpu_share"] > 0 and closed["cpu_share"] > 0
    assert 0 < closed["latency_p50_ms"] <= closed["latency_p99_ms"]
    assert closed["answered_rps"] > 0
