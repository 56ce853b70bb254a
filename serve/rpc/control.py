"""`tandem.v1.ControlService`: status, traffic policy, drain and abort, on a listener of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import grpc

from protos.tandem.v1 import control_pb2 as pb
from serve.errors import ModelsNotComparableError, StalePolicyError
from serve.pair.coordinator import Coordinator
from serve.pair.routing import TrafficPolicy, are_comparable
from serve.pair.served import Engines, Role
from serve.rpc import replies
from serve.rpc.calls import Call, CallGuard, Context, unary
from serve.rpc.decoding import parse
from serve.rpc.validation import validate_abort, validate_set_policy

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["ControlService"].full_name


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """What control sees of the server around it: its version, state and age; and how to end it."""

    version: str
    state: Callable[[], pb.ServerState]
    uptime_s: Callable[[], float]
    drain: Callable[[], None]


class ControlService:
    """Translates between messages, the coordinator and the server's life cycle."""

    def __init__(self, coordinator: Coordinator, lifecycle: Lifecycle, guard: CallGuard) -> None:
        self._coordinator = coordinator
        self._lifecycle = lifecycle
        self._guard = guard

    def handler(self) -> grpc.GenericRpcHandler:
        """Return what `grpc.aio.Server.add_generic_rpc_handlers` takes."""
        methods = {
            "GetStatus": self._get_status,
            "GetPolicy": self._get_policy,
            "SetPolicy": self._set_policy,
            "Drain": self._drain,
            "Abort": self._abort,
        }
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {rpc: unary(self._guard.surround(rpc, method)) for rpc, method in methods.items()},
        )

    async def _get_status(self, call: Call, data: bytes, context: Context) -> pb.GetStatusResponse:
        parse(data, pb.GetStatusRequest)
        coordinator, lifecycle = self._coordinator, self._lifecycle
        loads = [(model.role, model.engine.load()) for model in coordinator.engines.loaded]
        return pb.GetStatusResponse(
            version=lifecycle.version,
            state=lifecycle.state(),
            uptime_s=lifecycle.uptime_s(),
            engines=[
                pb.EngineStatus(
                    role=replies.to_role(role),
                    is_alive=load.is_alive,
                    num_running=load.num_running,
                    num_waiting=load.num_waiting,
                    max_num_seqs=load.max_num_seqs,
                )
                for role, load in loads
            ],
            num_requests=coordinator.num_running,
            num_shadows=coordinator.num_shadows,
            ledger_imbalance=sum(load.num_unaccounted for _, load in loads),
            policy=_to_policy(coordinator.policy),
        )

    async def _get_policy(self, call: Call, data: bytes, context: Context) -> pb.GetPolicyResponse:
        parse(data, pb.GetPolicyRequest)
        return pb.GetPolicyResponse(policy=_to_policy(self._coordinator.policy))

    async def _set_policy(self, call: Call, data: bytes, context: Context) -> pb.SetPolicyResponse:
        request = parse(data, pb.SetPolicyRequest)
        current = self._coordinator.policy
        changed = validate_set_policy(request, current)
        if request.HasField("expected_revision") and request.expected_revision != current.revision:
            raise StalePolicyError(
                f"expected_revision is {request.expected_revision}, the policy is at revision "
                f"{current.revision}; get it and decide again"
            )
        if changed != current:
            check_policy(changed, self._coordinator.engines)
            self._coordinator.policy = replace(changed, revision=current.revision + 1)
        return pb.SetPolicyResponse(policy=_to_policy(self._coordinator.policy))

    async def _drain(self, call: Call, data: bytes, context: Context) -> pb.DrainResponse:
        parse(data, pb.DrainRequest)
        self._lifecycle.drain()
        return pb.DrainResponse()

    async def _abort(self, call: Call, data: bytes, context: Context) -> pb.AbortResponse:
        request_id = validate_abort(parse(data, pb.AbortRequest))
        self._coordinator.abort(request_id)
        return pb.AbortResponse()


def check_policy(policy: TrafficPolicy, engines: Engines) -> None:
    """Raise unless the loaded models can do what the policy wants.

    Raises:
        ModelNotLoadedError: it sends traffic to a model that is not loaded.
        ModelsNotComparableError: it wants shadows, and there are no two comparable models.
    """
    weights = {Role.STUDENT: policy.student_weight, Role.TEACHER: policy.teacher_weight}
    for role in (role for role, weight in weights.items() if weight):
        engines.get(role)
    if policy.shadow_rate and not are_comparable(engines.loaded):
        raise ModelsNotComparableError(
            f"shadow_rate is {policy.shadow_rate:g}, but a shadow needs two models that share a "
            "tokenizer; loaded here: "
            + ", ".join(f"{m.role.value} {m.tokenizer.hash}" for m in engines.loaded)
        )


def _to_policy(policy: TrafficPolicy) -> pb.Policy:
    return pb.Policy(
        student_weight=policy.student_weight,
        teacher_weight=policy.teacher_weight,
        shadow_rate=policy.shadow_rate,
        revision=policy.revision,
    )
