"""How ROUTE_AUTO traffic is split between the models, and how much of it is scored in the shadow.

Both draws follow from the request id: a request that is repeated meets the same model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from serve.pair.routing import Role


@dataclass(frozen=True, slots=True)
class TrafficPolicy:
    """Weights of the models (not both 0), and the share of shadowed requests, 0 to 1."""

    student_weight: float = 1.0
    teacher_weight: float = 0.0
    shadow_rate: float = 0.0
    revision: int = 1

    def choose_role(self, request_id: str) -> Role:
        """Return the model that answers.

        >>> policy = TrafficPolicy(student_weight=3, teacher_weight=1)
        >>> sum(policy.choose_role(str(i)) is Role.STUDENT for i in range(1000))
        765
        """
        share = self.student_weight / (self.student_weight + self.teacher_weight)
        return Role.STUDENT if _uniform("route", request_id) < share else Role.TEACHER

    def wants_shadow(self, request_id: str) -> bool:
        """Say whether the other model shall score the answer."""
        return _uniform("shadow", request_id) < self.shadow_rate


def _uniform(purpose: str, request_id: str) -> float:
    """Return a number in [0, 1) that depends on its arguments alone."""
    digest = hashlib.sha256(f"{purpose}:{request_id}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2.0**56
