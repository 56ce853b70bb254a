"""Answers to their last bit, out of a journal."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from loadtest.ledger.journal import read_journal


def answers_of(journal: Path) -> dict[str, list[str]]:
    """Return, by request, its samples with log-probabilities and divergences, usage and code.

    In an order that does not depend on which sample ended first.
    """
    found: defaultdict[str, list[str]] = defaultdict(list)
    for event in read_journal([journal]):
        if event["event"] in ("sample", "usage", "end"):
            found[event["id"]].append(json.dumps(event, sort_keys=True))
    return {request_id: sorted(events) for request_id, events in found.items()}


def codes_of(journal: Path) -> dict[str, str]:
    """Return how each call ended."""
    return {e["id"]: e["code"] for e in read_journal([journal]) if e["event"] == "end"}
