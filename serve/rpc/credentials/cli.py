"""`tandem token`: for whoever runs a server, on a machine that needs none of its packages."""

from __future__ import annotations

from typing import Annotated

import typer

from serve.rpc.credentials.tokens import new_token, parse_client


def token(
    name: Annotated[str, typer.Argument(help="Name of the client that it is for.")],
    scope: Annotated[
        str,
        typer.Option(
            help="Scopes that it opens, joined by commas: inference, control, reflection."
        ),
    ] = "inference",
) -> None:
    """Make a token: print it on stdout, and its line of the server's token file on stderr."""
    try:
        parse_client(name, scope)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    secret, sha256 = new_token()
    typer.echo(secret)
    typer.echo(f"{name} {sha256} {scope}", err=True)
