"""`tandem serve`: flags only. What it needs is imported when it runs."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from serve.app.flags import with_settings_flags
from serve.app.settings import load_settings


@with_settings_flags
def serve(
    config: Annotated[
        Path | None,
        typer.Option(help="File of settings, in YAML or TOML, named as the flags (default: none)."),
    ] = None,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config", help="Print the settings in force, as a config file, and exit."
        ),
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
