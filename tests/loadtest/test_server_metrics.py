"""Client and server must have seen the same run."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from bundle.errors import UserError
from loadtest.analysis.cross_check import cross_check
from loadtest.records import RequestRecord, SampleRecord
from loadtest.server_metrics import parse, scrape, why_restarted
from serve.http.server import MetricsServer
from tests.support.load_tests import recorded

EDGES = ("0.1", "0.2", "0.5", "+Inf")


def exposition(counts: dict[str, int], cumulative: tuple[int, ...]) -> str:
    lines = ["# TYPE tandem_requests_total counter"]
    lines += [
        f'tandem_requests_total{{code="{code}",route="student",rpc="Generate",task="other"}} {n}'
        for code, n in counts.items()
    ]
    lines += ["# TYPE tandem_time_to_first_token_seconds histogram"]
    lines += [
        f'tandem_time_to_first_token_seconds_bucket{{le="{le}",role="student"}} {n}'
        for le, n in zip(EDGES, cumulative, strict=True)
    ]
    lines.append(f'tandem_time_to_first_token_seconds_count{{role="student"}} {cumulative[-1]}')
    lines.append('tandem_time_to_first_token_seconds_sum{role="student"} 0')
    return "\n".join(lines) + "\n"


def record(ttft_s: float | None, status: str = "OK") -> RequestRecord:
    times_s = [] if ttft_s is None else [1.0 + ttft_s, 9.0]
    # A second sample, which had to wait, and a third one without tokens, count for nothing.
    samples = [
        SampleRecord(index, token_times_s=times)
        for index, times in enumerate(([t + 5 for t in times_s], times_s, []))
    ]
    return recorded(sent_s=1.0, ended_s=9.0, status=status, samples=samples)


BEFORE = parse(exposition({"OK": 5}, (1, 3, 4, 5)))
RECORDS = [record(0.05), record(0.15), record(0.19), record(0.3), record(None, "UNAVAILABLE")]


def test_a_run_that_both_sides_saw_alike_agrees() -> None:
    after = parse(exposition({"OK": 9, "UNAVAILABLE": 1}, (2, 6, 8, 9)))
    found = cross_check(BEFORE, after, RECORDS, ["student"])
    assert found.agrees
    (counts,) = found.counts
    assert counts.client == counts.server == {"OK": 4, "UNAVAILABLE": 1}
    median, p95 = found.ttft
    assert (median.client_s, median.server_low_s, median.server_high_s) == pytest.approx(
        (0.15, 0.1, 0.2)
    )
    assert (p95.server_low_s, p95.server_high_s) == (0.2, 0.5)
    assert (median.num_buckets_apart, p95.num_buckets_apart, p95.count) == (0, 0, 4)


def test_quantile_may_be_one_bucket_apart_and_no_more() -> None:
    one = parse(exposition({"OK": 9, "UNAVAILABLE": 1}, (3, 7, 8, 9)))
    found = cross_check(BEFORE, one, RECORDS, ["student"])
    assert [check.num_buckets_apart for check in found.ttft] == [1, 1]
    assert found.agrees
    two = parse(exposition({"OK": 9, "UNAVAILABLE": 1}, (1, 3, 4, 9)))
    found = cross_check(BEFORE, two, RECORDS, ["student"])
    assert [check.num_buckets_apart for check in found.ttft] == [2, 1]
    assert not found.agrees


def test_request_that_one_side_did_not_count_disagrees() -> None:
    after = parse(exposition({"OK": 9}, (2, 6, 8, 9)))
    assert not cross_check(BEFORE, after, RECORDS, ["student"]).agrees


def test_run_without_tokens_has_no_quantiles() -> None:
    after = parse(exposition({"OK": 5, "UNAVAILABLE": 1}, (1, 3, 4, 5)))
    found = cross_check(BEFORE, after, RECORDS[-1:], ["student"])
    assert found.agrees and not found.ttft


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://127.0.0.1:1/metrics", r": .*refused"),
        ("127.0.0.1:9464", ": write http://HOST:PORT/metrics"),
        ("file:///etc/hostname", ": write http://HOST:PORT/metrics"),
    ],
)
def test_metrics_that_cannot_be_had_are_an_error(url: str, told: str) -> None:
    with pytest.raises(UserError, match=f"^{url}{told}"):
        scrape(url)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/metrics", "no Tandem metrics are there"),
        ("/", "no Tandem metrics are there"),
        ("/nothing", "Not Found"),
    ],
)
def test_page_without_our_metrics_is_an_error(path: str, told: str) -> None:
    server = MetricsServer(CollectorRegistry(), lambda: True, "127.0.0.1", 0)
    server.start()
    with pytest.raises(UserError, match=f"{told}; write http://HOST:PORT/metrics"):
        scrape(server.url.replace("/metrics", path))
    server.stop()


def test_scrape_has_every_series_by_name_and_labels() -> None:
    found = parse('x_total{role="a",kind="b"} 3\nx_total{role="a",kind="c"} 1\ny 0\n')
    assert found.of("x_total", kind="b") == {frozenset({("role", "a"), ("kind", "b")}): 3.0}
    assert found.total("x_total", role="a") == 4 and len(found.values) == 3


def test_counter_that_fell_tells_a_server_that_began_anew() -> None:
    anew = parse(exposition({"OK": 2}, (1, 3, 4, 5)))
    assert why_restarted(BEFORE, BEFORE) == why_restarted(anew, BEFORE) == ""
    assert why_restarted(BEFORE, anew).endswith('task="other"} fell from 5 to 2')
    assert why_restarted(BEFORE, parse("")).endswith(" to 0")


def test_gauge_may_fall() -> None:
    assert why_restarted(parse("tandem_batch_size 4"), parse("tandem_batch_size 2")) == ""
