"""Which requests expire, and how much is remembered of those that ended before."""

from __future__ import annotations

from serve.engine.waiting import Deadlines


def test_expired_ids_come_earliest_first_and_once() -> None:
    deadlines = Deadlines(set)
    for deadline_s, request_id in ((3.0, "c"), (1.0, "a"), (2.0, "b"), (1.0, "a")):
        deadlines.add(deadline_s, request_id)
    assert list(deadlines.pop_expired(2.0)) == ["a", "a", "b"]
    assert list(deadlines.pop_expired(2.5)) == []
    assert list(deadlines.pop_expired(9.0)) == ["c"]


def test_memory_follows_what_lives() -> None:
    live: set[str] = set()
    deadlines = Deadlines(lambda: live)
    for number in range(10_000):
        live.add(str(number))
        live.discard(str(number - 100))
        deadlines.add(1000.0 + number, str(number))
        assert len(deadlines) <= 512
    assert live <= set(deadlines.pop_expired(1e9))


def test_nothing_that_lives_is_forgotten() -> None:
    deadlines = Deadlines(lambda: {str(number) for number in range(1000)})
    for number in range(1000):
        deadlines.add(float(number), str(number))
    assert len(list(deadlines.pop_expired(1e9))) == 1000
