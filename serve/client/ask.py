"""`tandem ask`: one prompt to both models, shown side by side in the terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import grpc
import typer
from rich.console import Console

from bundle.errors import UsageError
from protos.tandem.v1 import inference_pb2 as pb
from serve.addresses import DATA_PORT
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
from serve.client.channel import Tls
from serve.client.client import Client
from serve.client.side_by_side import render

# The exit code of a shell's command that SIGINT ended.
INTERRUPTED = 130
_NO_DATA_PORT = (
    "no Tandem server takes requests there; is it the control listener? `tandem serve` shows where "
    f"it serves, which is port {DATA_PORT} by default (--port)"
)


def ask(
    prompt: Annotated[
        str,
        typer.Argument(help="The question; - reads it from stdin, -- stands before one with a -."),
    ],
    target: Annotated[
        str, typer.Option(help="Server, as HOST:PORT or unix:/PATH.")
    ] = "127.0.0.1:50051",
    num_samples: Annotated[int, typer.Option(help="Answers per model.")] = 1,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sampling temperature; 0 is greedy (default: the server's)."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Largest answer, in tokens (default: the server's).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed that repeats an earlier run (default: random).")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Right answer, for correctness and pass@k (default: none).")
    ] = None,
    answer_format: Annotated[
        str | None,
        typer.Option(
            help="How answers are read: last_number, boxed, choice, final_line (default: "
            "last_number with --reference, else none)."
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Send the text as it stands, not as a chat message.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the Compare response as JSON.")
    ] = False,
    timeout_s: Annotated[
        float, typer.Option(help="Time to wait for the answers, in seconds.")
    ] = 300.0,
    connect_timeout_s: ConnectTimeout = CONNECT_TIMEOUT_S,
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Ask both models; show their answers side by side, coloured by divergence."""
    run(
        read_target(target),
        Question(
            prompt=read_prompt(prompt),
            num_samples=num_samples,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            reference=reference,
            answer_format=answer_format,
            is_raw=raw,
        ),
        as_json=as_json,
        timeout_s=timeout_s,
        connect_timeout_s=connect_timeout_s,
        token=read_token(token_file),
        tls=tls_of(tls_ca, tls_cert, tls_key),
    )


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask; None leaves a value to the server."""

    prompt: str
    num_samples: int = 1
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    reference: str | None = None
    answer_format: str | None = None
    is_raw: bool = False

    def to_request(self) -> pb.CompareRequest:
        request = pb.CompareRequest(
            sampling=pb.SamplingParams(
                num_samples=self.num_samples,
                temperature=self.temperature,
                max_tokens=self.max_tokens,
                seed=self.seed,
            ),
            divergence=pb.DivergenceOptions(per_token=True),
        )
        if self.is_raw:
            request.prompt = self.prompt
        else:
            request.messages.messages.add(role="user", content=self.prompt)
        answer_format = self.answer_format or ("last_number" if self.reference else None)
        if answer_format:
            request.evaluation.answer_format = answer_format
        if self.reference is not None:
            request.evaluation.reference_answer = self.reference
            request.evaluation.pass_at_k.extend(sorted({1, self.num_samples}))
        return request


def read_prompt(text: str) -> str:
    """Return a prompt as it was given; what stdin holds for `-`, without the last line's end.

    Raises:
        UsageError: stdin is empty, or no UTF-8 text.
    """
    if text == "-":
        if sys.stdin.isatty():
            print("reading the question from stdin; end it with Ctrl-D", file=sys.stderr)
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"stdin holds no UTF-8 text: byte {error.start}") from None
        text = text.removesuffix("\n").removesuffix("\r")
    if not text.strip():
        raise UsageError("the question is empty; give one, or - to read it from stdin")
    return text


def run(
    target: str,
    question: Question,
    *,
    as_json: bool,
    timeout_s: float,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
    token: str | None = None,
    tls: Tls | None = None,
) -> None:
    """Ask, and print; Ctrl-C cancels the calls and exits with 130.

    UserError with the server's words when it refuses or is not there, or when token or TLS cannot
    be used.
    """
    try:
        with open_client(Client, target, timeout_s, token, tls) as client:
            wait_connected(client, target, connect_timeout_s, client.get_models)
            models = client.get_models()
            response = client.compare(question.to_request())
    except grpc.RpcError as error:
        raise explain_to_user(error, target, _NO_DATA_PORT) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    if as_json:
        print(to_json(response))
    else:
        Console().print(render(question.prompt, models, response))
