"""`tandem control`: asks and tells a server through its control listener."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple

import grpc
import typer
from google.protobuf.message import Message

from protos.tandem.v1 import control_pb2 as pb
from protos.tandem.v1 import inference_pb2
from serve.addresses import CONTROL_PORT
from serve.client.access import (
    CONNECT_TIMEOUT_S,
    ConnectTimeout,
    TlsCa,
    TlsCert,
    TlsKey,
    TokenFile,
    explain_to_user,
    open_client,
    read_target,
    read_token,
    tls_of,
    to_json,
    wait_connected,
)
from serve.client.client import ControlClient

app = typer.Typer(
    help="See what a server does, split its traffic, end it or one of its requests.",
    no_args_is_help=True,
)

_NO_CONTROL = (
    "no control listener is there; is it the server's data port? `tandem serve` shows where it "
    f"takes control, which is port {CONTROL_PORT} by default (--control-port)"
)

Weight = Annotated[
    float | None, typer.Option(help="Relative share of ROUTE_AUTO traffic (default: as it is).")
]


class Reply(NamedTuple):
    """What a command prints: the text, or with --json the message."""

    message: Message
    text: str


@contextmanager
def connect(
    target: Annotated[
        str, typer.Option(help="Control listener, as HOST:PORT or unix:/PATH.")
    ] = "127.0.0.1:50052",
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    timeout_s: Annotated[
        float, typer.Option(help="Time to wait for the answer, in seconds.")
    ] = 10.0,
    connect_timeout_s: ConnectTimeout = CONNECT_TIMEOUT_S,
) -> Iterator[ControlClient]:
    """Yield a client of the server that the flags name; UserError with its words if it refuses."""
    tls = tls_of(tls_ca, tls_cert, tls_key)
    target = read_target(target, CONTROL_PORT)
    with open_client(ControlClient, target, timeout_s, read_token(token_file), tls) as control:
        try:
            wait_connected(control, target, connect_timeout_s, control.status)
            yield control
        except grpc.RpcError as error:
            raise explain_to_user(error, target, _NO_CONTROL) from None


def _command(
    check: Callable[..., None] = lambda **flags: None,
) -> Callable[[Callable[..., Reply]], Callable[..., Reply]]:
    """Make commands of functions whose first parameter is the client, with `connect`'s flags.

    `check` is told a command's own flags before the server is asked anything.
    """

    def decorate(call: Callable[..., Reply]) -> Callable[..., Reply]:
        _add(call, check)
        return call

    return decorate


def _add(call: Callable[..., Reply], check: Callable[..., None]) -> None:
    _, *own = inspect.signature(call, eval_str=True).parameters.values()
    shared = inspect.signature(connect, eval_str=True).parameters

    def command(as_json: bool, **flags: Any) -> None:
        options = {name: flags.pop(name) for name in shared}
        check(**flags)
        with connect(**options) as control:
            answer = call(control, **flags)
        typer.echo(to_json(answer.message) if as_json else answer.text)

    json_flag = inspect.Parameter(
        "as_json",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=False,
        annotation=Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")],
    )
    vars(command)["__signature__"] = inspect.Signature([*own, *shared.values(), json_flag])
    app.command(call.__name__.replace("_", "-"), help=call.__doc__)(command)


@_command()
def status(control: ControlClient) -> Reply:
    """Show what the server is doing."""
    found = control.status()
    return Reply(found, describe_status(found))


@_command()
def policy(control: ControlClient) -> Reply:
    """Show how requests are answered that leave the route to the server (ROUTE_AUTO)."""
    found = control.policy()
    return Reply(found, describe_policy(found))


def _check_change(expected_revision: int | None, **changes: float | None) -> None:
    if all(value is None for value in changes.values()):
        raise typer.BadParameter("give --student-weight, --teacher-weight or --shadow-rate")


@_command(_check_change)
def set_policy(
    control: ControlClient,
    student_weight: Weight = None,
    teacher_weight: Weight = None,
    shadow_rate: Annotated[
        float | None,
        typer.Option(help="Share of answers that get shadow scoring, 0 to 1 (default: as it is)."),
    ] = None,
    expected_revision: Annotated[
        int | None, typer.Option(help="Revision at which the policy must still be (default: any).")
    ] = None,
) -> Reply:
    """Change the policy, until the server ends; what is not given stays as it is."""
    changed = control.set_policy(
        student_weight=student_weight,
        teacher_weight=teacher_weight,
        shadow_rate=shadow_rate,
        expected_revision=expected_revision,
    )
    return Reply(changed, describe_policy(changed))


@_command()
def drain(control: ControlClient) -> Reply:
    """End the server as SIGTERM does: what runs may end; this command does not wait for it."""
    control.drain()
    return Reply(pb.DrainResponse(), "draining")


@_command()
def abort(
    control: ControlClient, request_id: Annotated[str, typer.Argument(help="Id of the request.")]
) -> Reply:
    """End one running request: its call fails with the status CANCELLED."""
    control.abort(request_id)
    return Reply(pb.AbortResponse(), f"aborted {request_id}")


def describe_status(status: pb.GetStatusResponse) -> str:
    """Return a status for people, a line per engine."""
    state = pb.ServerState.Name(status.state).removeprefix("SERVER_STATE_").lower()
    return "\n".join(
        [
            f"{state} for {status.uptime_s:.0f} s, version {status.version}",
            *map(_describe_engine, status.engines),
            f"requests: {status.num_requests}, shadows: {status.num_shadows}, "
            f"ledger imbalance: {status.ledger_imbalance}",
            describe_policy(status.policy),
        ]
    )


def _describe_engine(engine: pb.EngineStatus) -> str:
    name = inference_pb2.Role.Name(engine.role).removeprefix("ROLE_").lower()
    if not engine.is_alive:
        return f"{name}: down"
    return (
        f"{name}: {engine.num_running} of {engine.max_num_seqs} running, "
        f"{engine.num_waiting} waiting"
    )


def describe_policy(policy: pb.Policy) -> str:
    """Return a policy on one line."""
    return (
        f"policy {policy.revision}: student {policy.student_weight:g}, "
        f"teacher {policy.teacher_weight:g}, shadow rate {policy.shadow_rate:g}"
    )
