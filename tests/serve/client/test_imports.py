"""What a program that talks to a server must have installed: gRPC and protobuf."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "accelerate jinja2 matplotlib numpy onnx onnxruntime prometheus_client pydantic safetensors "
    "scipy tokenizers torch transformers yaml"
)
IMPORT = """
import sys
from tests.support.without_packages import Missing
sys.meta_path.insert(0, Missing(set(sys.argv[2].split())))
exec(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("from serve.client import Client", f"{HEAVY} typer rich"),
        ("import serve.client.ask, serve.client.control, tandem.cli", HEAVY),
    ],
)
def test_client_without_the_packages_of_a_server_is_imported(statement: str, absent: str) -> None:
    words = [sys.executable, "-c", IMPORT, statement, absent]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
