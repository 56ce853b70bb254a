"""`tandem serve`, `ask` and `token`: flags only. What they need is imported when they run."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from serve.app.flags import with_settings_flags
from serve.app.settings import load_settings
from serve.client.access import (
    CONNECT_TIMEOUT_S,
    ConnectTimeout,
    TlsCa,
    TlsCert,
    TlsKey,
    TokenFile,
    read_target,
    read_token,
    tls_of,
)


@with_settings_flags
def serve(
    config: Annotated[
        Path | None, typer.Option(help="YAML or TOML with settings, named as the flags below.")
    ] = None,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Print the settings in force, as a config file; end."),
    ] = False,
    **flags: str | bool | None,
) -> None:
    """Serve a bundle's student, and its teacher, over gRPC until SIGTERM.

    Every setting may also be a variable of the environment (TANDEM_MAX_NUM_SEQS for
    --max-num-seqs) or a key of the config file (max_num_seqs). A flag wins over the environment,
    the environment over the file.
    """
    settings = load_settings(flags, os.environ, config)
    if print_config:
        typer.echo(settings.to_yaml(), nl=False)
        return
    from serve.app.grpc_log import quiet_grpc

    quiet_grpc()
    from serve.app import process

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    process.serve(settings.config)


def ask(
    prompt: Annotated[
        str,
        typer.Argument(help="The question; - reads it from stdin, -- stands before one with a -."),
    ],
    target: Annotated[
        str, typer.Option(help="HOST:PORT or unix:/PATH of the server.")
    ] = "127.0.0.1:50051",
    num_samples: Annotated[int, typer.Option(help="Answers per model.")] = 1,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens per answer at most.")] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats the draws of an earlier run.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="The right answer, for correctness and pass@k.")
    ] = None,
    answer_format: Annotated[
        str | None,
        typer.Option(help="last_number (default with --reference), boxed, choice, final_line."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Send the text as it stands, not as a chat message.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the Compare response as JSON.")
    ] = False,
    timeout_s: Annotated[float, typer.Option(help="Seconds to wait for the answers.")] = 300.0,
    connect_timeout_s: ConnectTimeout = CONNECT_TIMEOUT_S,
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Ask both models; show their answers side by side, coloured by divergence."""
    target = read_target(target)
    from serve.client.ask import Question, read_prompt, run

    run(
        target,
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


def token(
    name: Annotated[str, typer.Argument(help="The client that it is for.")],
    scope: Annotated[
        str, typer.Option(help="What it opens: inference, control, reflection; joined by commas.")
    ] = "inference",
) -> None:
    """Make a token: print it on stdout, and its line of the server's token file on stderr."""
    from serve.rpc.credentials.tokens import new_token, parse_client

    try:
        parse_client(name, scope)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    secret, sha256 = new_token()
    typer.echo(secret)
    typer.echo(f"{name} {sha256} {scope}", err=True)
