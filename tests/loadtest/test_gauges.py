"""What the server's metrics tell while a run goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from bundle.errors import UserError
from loadtest.server_metrics import Scrape, ServerWatch, parse


def reading(*pages: str | None) -> Callable[[str], Scrape]:
    """Return a reader of these pages, one after the other; None: it cannot be had."""
    left = iter(pages)

    def read(url: str) -> Scrape:
        page = next(left)
        if page is None:
            raise UserError("http://x: nobody is there")
        return parse(page)

    return read


def watched(*pages: str | None) -> ServerWatch:
    """Return a watch at its end, the load so short that it was not looked at meanwhile."""
    watch = ServerWatch("http://x", reading(*pages))
    watch.start()
    watch.stop()
    return watch


def test_counters_that_grow_are_no_news() -> None:
    watch = watched("tandem_x_total 3", "tandem_x_total 5")
    assert watch.notes == [] and not watch.is_restarted and watch.after is not None


def test_counter_that_fell_is_a_server_that_began_anew() -> None:
    watch = watched("tandem_x_total 35", "tandem_x_total 2")
    assert watch.is_restarted
    assert watch.notes == [
        "the server began anew during the load: tandem_x_total fell from 35 to 2"
    ]


def test_restart_is_seen_though_the_counter_is_higher_again_at_the_end() -> None:
    watch = ServerWatch("http://x", reading(*(f"tandem_x_total {n}" for n in (3, 9, 1, 12))))
    for _ in range(2):
        watch.look()
    watch.start()
    watch.stop()
    assert watch.is_restarted and watch.notes[0].endswith("fell from 9 to 1")


def test_metrics_that_are_gone_are_said() -> None:
    watch = watched("tandem_x_total 3", None)
    assert watch.after is None and not watch.is_restarted
    (note,) = watch.notes
    assert note.startswith("the server's metrics were gone behind the load: http://x: nobody")


def test_metrics_must_be_there_before_the_load() -> None:
    with pytest.raises(UserError, match="--metrics-url http://x: nobody is there"):
        ServerWatch("http://x", reading(None))


GAUGES = """
tandem_sequences_waiting{role="student",priority="x"} 2
tandem_sequences_waiting{role="student",priority="y"} 1
tandem_sequences_running{role="student"} 4
tandem_batch_size{role="student"} 3
"""


def test_gauges_are_summed_by_role(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.server_metrics.INTERVAL_S", 0.0)
    num_reads = threading.Semaphore(0)

    def read(url: str) -> Scrape:
        num_reads.release()
        return parse(GAUGES)

    watch = ServerWatch("http://x", read)
    watch.set_start(0.0)
    watch.start()
    for _ in range(3):  # before the load, and twice during it: the first of those is taken
        num_reads.acquire()
    watch.stop()
    first = watch.timeline["student"][0]
    assert (first["waiting"], first["running"], first["batch"]) == (3, 4, 3)
