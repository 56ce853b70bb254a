"""The series that exist from a server's start, at 0.

`increase()` and `rate()` see what a counter grows by between two scrapes, so what a series begins
with is lost: the first INTERNAL of a pod, or all that one evaluation says. Therefore label sets
that are known at the start are made then. Not `k` of pass@k, which requests choose from a range.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import product

import grpc

from protos.oip import grpc_service_pb2
from protos.tandem.v1 import control_pb2, inference_pb2
from serve.metrics.server_metrics import ServerMetrics
from serve.pair.answers.judge import ConsensusOutcome
from serve.pair.request import OTHER_TASK
from serve.pair.routing import Route, are_comparable
from serve.pair.served import Engines

# What `serve.rpc.statuses` and `serve.rpc.gate` answer.
CODES = (
    grpc.StatusCode.OK,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNAUTHENTICATED,
)
# The routes of rpcs that have some. With the route "none" calls are counted that ended before
# theirs was known, and those of all other rpcs.
_ROUTES = {
    "Generate": tuple(Route),
    "Compare": (Route.BOTH,),
    "ModelInfer": (Route.STUDENT, Route.TEACHER),
    "ModelStreamInfer": (Route.STUDENT, Route.TEACHER),
}
_WITH_TASKS = ("Generate", "Compare")
_FILES = (inference_pb2.DESCRIPTOR, control_pb2.DESCRIPTOR, grpc_service_pb2.DESCRIPTOR)
_REMOTE_CALLS = ("Generate", "Score")


def begin_series(metrics: ServerMetrics, engines: Engines, tasks: Collection[str]) -> None:
    """Make the series of calls, comparisons and answers; an engine makes its own (`observer`)."""
    all_tasks = (OTHER_TASK, *sorted(tasks))
    for rpc, route, task in _calls(all_tasks):
        for code in CODES:
            metrics.requests.labels(rpc, route, code.name, task)
    if any(model.address for model in engines.loaded):
        for rpc, each in product(_REMOTE_CALLS, grpc.StatusCode):
            metrics.remote_calls.labels(rpc, each.name)
    for model in engines.loaded:
        metrics.vote_share.labels(model.role.value)
    if len(engines.loaded) == 2:
        for outcome, task in product(ConsensusOutcome, all_tasks):
            metrics.consensus.labels(outcome.value, task)
    if are_comparable(engines.loaded):
        _begin_divergences(metrics, engines, all_tasks)


def _calls(tasks: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """Yield rpc, route and task."""
    for service in (service for file in _FILES for service in file.services_by_name.values()):
        yield from ((method.name, "none", OTHER_TASK) for method in service.methods)
    for rpc, routes in _ROUTES.items():
        for route in routes:
            for task in tasks if rpc in _WITH_TASKS else (OTHER_TASK,):
                yield rpc, route.value, task


def _begin_divergences(metrics: ServerMetrics, engines: Engines, tasks: Collection[str]) -> None:
    """Of both models to one another; exact ones need both models in this process."""
    is_exact = len(engines.local) == 2
    for model in engines.loaded:
        policy = model.role.value
        metrics.divergence_nonfinite.labels(policy)
        metrics.divergence_truncated.labels(policy)
        for task in tasks:
            for estimator in ("k1", "k2", "k3", *(("exact",) if is_exact else ())):
                metrics.divergence_nats.labels(estimator, policy, task)
            for estimator in ("k3", *(("exact",) if is_exact else ())):
                metrics.divergence_sum.labels(estimator, policy, task)
                metrics.divergence_tokens.labels(estimator, policy, task)
    if is_exact:
        for task in tasks:
            metrics.compared_tokens.labels(task)
            metrics.argmax_agreeing.labels(task)
            metrics.predicted_acceptance.labels(task)
