"""Which models answer a request, which one scores the answers, and when shadow scoring happens.

AUTO means the model that the traffic policy chose, or the one that is loaded alone. The samples
of either model are scored by the other one, so the two must share a tokenizer.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from serve.errors import ModelsNotComparableError
from serve.pair.served import Engines, Role, ServedModel


class Route(enum.Enum):
    """Which models a request wants; the value is its label in metrics."""

    STUDENT = "student"
    TEACHER = "teacher"
    BOTH = "both"
    AUTO = "auto"


@dataclass(frozen=True, slots=True)
class TrafficPolicy:
    """Weights of the models (not both 0), and the share of requests with shadow scoring, 0 to 1.

    Both draws follow from the request id: a request that is repeated meets the same model.
    """

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
        """Say whether the other model scores the answer after it was returned."""
        return _uniform("shadow", request_id) < self.shadow_rate


def choose_models(route: Route, engines: Engines, auto: Role) -> tuple[ServedModel, ...]:
    """Return the models that answer, the student first; AUTO is the role `auto` if that lives.

    Raises:
        ModelNotLoadedError: one is missing.
    """
    if route is Route.BOTH:
        return engines.get(Role.STUDENT), engines.get(Role.TEACHER)
    if route is Route.AUTO:
        living = [model for model in engines.loaded if model.is_alive] or engines.loaded
        return (next((model for model in living if model.role is auto), living[0]),)
    return (engines.get(Role(route.value)),)


def resolve_divergence(enabled: bool | None, engines: Engines, *, exactly: bool) -> bool:
    """Say whether samples are scored by the other model; by default, when both are served.

    Raises:
        ModelsNotComparableError: it is wanted, but impossible with what is loaded.
    """
    if enabled is None:
        enabled = len(engines.loaded) == 2
    if enabled:
        check_comparable(engines.loaded, exactly=exactly)
    return enabled


def are_comparable(models: Sequence[ServedModel]) -> bool:
    """Say whether these are two models that share a tokenizer."""
    return len(models) == 2 and models[0].tokenizer.hash == models[1].tokenizer.hash


def check_comparable(models: Sequence[ServedModel], *, exactly: bool) -> None:
    """Raise ModelsNotComparableError, which says why, unless `are_comparable`.

    An exact comparison needs the logits of both, so both in this process.
    """
    remote = next((model for model in models if model.address), None)
    if exactly and remote is not None:
        raise ModelsNotComparableError(
            f"the {remote.role.value} is at {remote.address}, and logits do not travel; set "
            "divergence.exact to false"
        )
    if are_comparable(models):
        return
    if len(models) < 2:
        raise ModelsNotComparableError(
            f"a divergence needs two models, this is the {models[0].role.value} alone; "
            "set divergence.enabled to false"
        )
    first, second = models
    raise ModelsNotComparableError(
        f"the tokenizers differ ({first.role.value} {first.tokenizer.hash}, "
        f"{second.role.value} {second.tokenizer.hash}), so there is no divergence between the "
        "models; set divergence.enabled to false"
    )


def _uniform(purpose: str, request_id: str) -> float:
    """Return a number in [0, 1) that depends on its arguments alone."""
    digest = hashlib.sha256(f"{purpose}:{request_id}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2.0**56
