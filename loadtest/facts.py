"""What is said of a run before its load: what was asked, on what machine, of which models."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict

from bundle.errors import UserError
from loadtest.client.targets import Credentials
from loadtest.config import RunConfig
from loadtest.progress import ProgressReporter
from loadtest.workload.schedule import Schedule
from serve.client import Client, explain
from serve.client.access import open_client, wait_connected

_PACKAGES = ("tandem", "grpcio", "numpy")


def describe_run(
    config: RunConfig, schedule: Schedule, credentials: Credentials, reporter: ProgressReporter
) -> dict[str, Any]:
    """Return what `run.json` says of a run at its start. UserError: the server is not there."""
    return {
        "command": ["tandem", *sys.argv[1:]],
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": config.model_dump(mode="json"),
        "schedule_sha256": schedule.sha256,
        "num_requests": len(schedule.requests),
        "machine": {
            "num_cpus": os.cpu_count(),
            "architecture": platform.machine(),
            "system": platform.system(),
        },
        "versions": _versions(),
        "models": ask_models(config, credentials, reporter),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def ask_models(
    config: RunConfig, credentials: Credentials, reporter: ProgressReporter
) -> list[dict[str, Any]]:
    """Wait for the server, and return what it says of its models, where it speaks our protocol."""
    try:
        with open_client(
            Client, config.target, config.timeout_s, credentials.token, credentials.tls
        ) as client:
            wait_connected(
                client, config.target, config.connect_timeout_s, client.get_models, reporter.say
            )
            if config.protocol != "tandem":
                return []
            models = client.get_models().models
    except grpc.RpcError as error:
        raise UserError(f"--target {config.target}: {explain(error)}") from None
    return [MessageToDict(model, preserving_proto_field_name=True) for model in models]
