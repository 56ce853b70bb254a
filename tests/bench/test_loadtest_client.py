from __future__ import annotations

from bench.loadtest_client import config_of, measure, null_server


def test_both_loops_get_answers_from_the_null_server() -> None:
    with null_server(core=0) as target:
        (row,) = measure(config_of(target, 0.2, arrival="constant", rates_rps=(50.0,)))
        (closed,) = measure(config_of(target, 0.2, arrival="closed", concurrency=(2,)))
    assert 35 <= row["answered_rps"] <= 50
    assert 0 <= row["send_lag_ms"]["p50"] <= row["send_lag_ms"]["p99"]
    assert 0 < row["cpu_share"] < closed["cpu_share"]
    assert closed["latency_ms"]["p50"] > 0
    assert closed["answered_rps"] > 50
