"""The served models: which role each one has, what runs it, and where it came from."""

from __future__ import annotations

import enum
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve.errors import ModelNotLoadedError
from serve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from serve.engine.engine import Engine
    from serve.models.noise import NoiseFloor
    from serve.pair.remote_teacher import RemoteTeacher


class Role(enum.Enum):
    """A model's place in the pair; the value is its label in metrics."""

    STUDENT = "student"
    TEACHER = "teacher"

    @property
    def other(self) -> Role:
        return Role.TEACHER if self is Role.STUDENT else Role.STUDENT


@dataclass(frozen=True, slots=True)
class ServedModel:
    """An engine, the tokenizer of its model, and where the model came from.

    `noise` was measured when it was loaded; `backend_noise_nats` is the mean KL(the model in torch
    and float32 || as it is served), measured when it was exported. `address` is that of the remote
    server, empty where the model is loaded in this process.
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
        """The models that run in this process: without one there is no server."""
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
