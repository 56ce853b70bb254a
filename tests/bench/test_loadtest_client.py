from __future__ import annotations

from bench.loadtest_client import config_of, measure, null_server


def test_both_loops_get_answers_from_the_null_server() -> None:
    with null_server(core=0) as target:
        (row,) = measure(config_of(target, 0.2, arrival="constant", rates_rps=(50.0,)))
        (closed,) = measure(config_of(target, 0.2, arrival="closed", concurrency=(2,)))
    assert 35 <= row["answered_rps"] <= 60
    assert 0 <= row["send_lag_p50_ms"] <= row["send_lag_p99_ms"]
    assert 0 < row["cpu_share"] < closed["cpu_share"]
    assert 0 < closed["latency_p50_ms"] <= closed["latency_p99_ms"]
    assert closed["answered_rps"] > 50
