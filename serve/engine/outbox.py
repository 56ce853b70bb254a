"""Events on their way from an engine to those who asked: one delivery per step and request."""

from __future__ import annotations

import logging

from serve.engine.sequence import Event, EventSink, SequenceGroup

logger = logging.getLogger(__name__)


class Outbox:
    """Collects a step's events by request."""

    def __init__(self) -> None:
        self._events: dict[int, tuple[EventSink, list[Event]]] = {}

    def add(self, group: SequenceGroup, event: Event) -> None:
        self._events.setdefault(id(group), (group.sink, []))[1].append(event)

    def flush(self) -> None:
        """Deliver everything. A reader that fails is logged and disturbs no other."""
        events, self._events = self._events, {}
        for sink, group_events in events.values():
            try:
                sink(group_events)
            except Exception:
                # A reader that is gone is no reason to fail the others.
                logger.exception("a reader of an engine's events failed")
