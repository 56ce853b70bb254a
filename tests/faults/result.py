"""What a row of the fault matrix is run at, and what comes of it."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from loadtest.ledger.ledger import Fault, Ledger


class Size(enum.Enum):
    """How much of a fault: enough for each run of the tests, or as much as is published."""

    CI = "ci"
    FULL = "full"


@dataclass(slots=True)
class RowResult:
    """One row of the table. `problems` says, a line each, which targets were missed.

    `num_requests` were under fault. `latency_ratio` is the worst that the row's target speaks of,
    None where it speaks of none. `measured` has the numbers behind the verdict, with units in their
    names. `slow` are those of the problems that a busy machine, or a process full of other tests,
    makes as well: the tests leave them to the campaign.
    """

    row: str
    fault: str
    num_requests: int = 0
    num_lost: int = 0
    num_duplicated: int = 0
    num_altered: int = 0
    leaks: list[str] = field(default_factory=list)
    latency_ratio: float | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)

    @property
    def is_passed(self) -> bool:
        return self.is_sound and not self.slow

    @property
    def is_sound(self) -> bool:
        """Whether all is well but what took too long."""
        faults = self.num_lost + self.num_duplicated + self.num_altered
        return not (faults or self.leaks or set(self.problems) - set(self.slow))

    def add(self, ledger: Ledger, *, is_under_fault: bool = True) -> None:
        """Count what a ledger objects to; its first objections are problems.

        Requests that came when the fault was over are checked, and not counted.
        """
        self.num_requests += ledger.num_requests if is_under_fault else 0
        self.num_lost += ledger.count(Fault.LOST)
        self.num_duplicated += ledger.count(Fault.DUPLICATED)
        self.num_altered += ledger.count(Fault.ALTERED)
        self.problems += [str(violation) for violation in ledger.violations[:5]]

    def demand(self, holds: bool, problem: str, *, is_timed: bool = False) -> None:
        """Note a target that was missed, with its numbers."""
        if not holds:
            self.problems.append(problem)
            self.slow += [problem] if is_timed else []

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"is_passed": self.is_passed}


class Row(Protocol):
    """A module r01_….py to r22_….py: its docstring's first line says the fault and the target."""

    def run(self, size: Size) -> RowResult:
        """Inject the fault, check the ledger, the leaks and the row's targets."""
