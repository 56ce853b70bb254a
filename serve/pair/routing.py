"""Which models answer a request, and which one scores the answers.

AUTO means the model that the traffic policy chose, or the one that is loaded alone. The samples
of either model are scored by the other one, so the two must share a tokenizer.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve.errors import ModelNotLoadedError, ModelsNotComparableError
from serve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from serve.engine.engine import Engine
    from serve.engine.scoring import NoiseFloor
    from serve.pair.remote_teacher import RemoteTeacher


class Role(enum.Enum):
    """A model's place in the pair; the value is its label in metrics."""

    STUDENT = "student"
    TEACHER = "teacher"

    @property
    def other(self) -> Role:
        return Role.TEACHER if self is Role.STUDENT else Role.STUDENT


class Route(enum.Enum):
    """Which models a request wants; the value is its label in metrics."""

    STUDENT = "student"
    TEACHER = "teacher"
    BOTH = "both"
    AUTO = "auto"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """An engine, the tokenizer of its model, and where the model came from.

    `noise` was measured when it was loaded; `backend_noise_nats` is the mean KL(the model in torch
    and float32 || as it is served), measured when it was exported. `address` is that of the server
    that answers for it, empty where it is loaded here.
    """

    role: Role
    engine: Engine | RemoteTeacher
    tokenizer: Tokenizer
    bundle_id: str = ""
    manifest_sha256: str = ""
    noise: NoiseFloor | None = None
    backend_noise_nats: float | None = None
    address: str = ""

    @property
    def is_alive(self) -> bool:
        return self.engine.load().is_alive


@dataclass(frozen=True, slots=True)
class Engines:
    """The served models: one or both."""

    student: ServedModel | None = None
    teacher: ServedModel | None = None

    @property
    def loaded(self) -> tuple[ServedModel, ...]:
        """The served models, the student first."""
        return tuple(model for model in (self.student, self.teacher) if model is not None)

    @property
    def local(self) -> tuple[ServedModel, ...]:
        """Those of them that run in this process: without them there is no server."""
        return tuple(model for model in self.loaded if not model.address)

    def get(self, role: Role) -> ServedModel:
        """Return a model; ModelNotLoadedError when it is not loaded."""
        for model in self.loaded:
            if model.role is role:
                return model
        names = ", ".join(model.role.value for model in self.loaded)
        raise ModelNotLoadedError(f"the {role.value} is not loaded here; loaded: {names}")

    def start(self) -> None:
        for model in self.loaded:
            model.engine.start()

    def watch(self) -> None:
        """Have engines notice that they hang; see `Engine.watch`."""
        for model in self.loaded:
            model.engine.watch()

    def stop(self, timeout_s: float | None = None) -> None:
        """End everything that runs with SHUTDOWN and wait for the engines' threads.

        All at once: one may hang in a step, and have the turn that another one waits for.
        """
        if not self.loaded:
            return
        with ThreadPoolExecutor(len(self.loaded)) as pool:
            for stopping in [pool.submit(m.engine.stop, timeout_s) for m in self.loaded]:
                stopping.result()


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
