"""NVIDIA's own client against a real server, in an environment of its own: protobuf < 7."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2

from protos.oip import grpc_service_pb2 as oip
from protos.tandem.v1 import inference_pb2 as pb

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).resolve().parents[4]
ENVIRONMENT = ROOT / ".cache" / "tritonclient"
REQUIREMENTS = (
    "tritonclient[grpc]==2.73.0", "protobuf==6.33.6", "grpcio==1.85.1", "numpy==2.4.6",
)  # fmt: skip
PROMPT = "1+1="
MODELS = ("student", "teacher")


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter of an environment with tritonclient, installed once per checkout (10 s)."""
    python, stamp = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "installed"
    if stamp.exists() and stamp.read_text() == repr(REQUIREMENTS):
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    installed = subprocess.run(
        [*pip, "--retries", "1", *REQUIREMENTS], capture_output=True, text=True, check=False
    )
    if "from versions: none" in installed.stderr and "CI" not in os.environ:
        pytest.skip("the package index cannot be reached, so there is no tritonclient")
    assert installed.returncode == 0, installed.stderr
    stamp.write_text(repr(REQUIREMENTS))
    return python


@pytest.fixture(scope="module")
def seen(python: Path, live: Any, tokenizer: Any) -> dict[str, Any]:
    """What tritonclient saw of a server with two models."""
    script = Path(__file__).with_name("tritonclient_session.py")
    token_ids = json.dumps(tokenizer.encode(PROMPT))
    result = subprocess.run(
        [str(python), str(script), live.server.address, PROMPT, token_ids],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answers: dict[str, Any] = json.loads(result.stdout)
    return answers


@pytest.fixture(scope="module")
def expected(live: Any) -> dict[str, pb.Sample]:
    """The same completions through our own service, by model."""
    sampling = pb.SamplingParams(max_tokens=8, seed=7, temperature=0.5, ignore_eos=True)
    found = {}
    for model in MODELS:
        request = pb.GenerateRequest(
            prompt=PROMPT,
            route=f"ROUTE_{model.upper()}",
            sampling=sampling,
            divergence=pb.DivergenceOptions(per_token=True),
        )
        events = live.client.generate(request)
        (found[model],) = [e.complete.sample for e in events if e.HasField("complete")]
    return found


def test_server_and_models_are_described(seen: dict[str, Any]) -> None:
    assert seen["is_live"] and seen["is_ready"] and seen["are_models_ready"] == [True, True]
    assert seen["server"]["name"] == "tandem" and "extensions" not in seen["server"]
    metadata, config = seen["metadata"], seen["config"]
    assert metadata["name"] == config["name"] == "student"
    outputs = ["output_ids", "text_output", "logprobs", "k3"]
    assert [output["name"] for output in metadata["outputs"]] == outputs
    assert [output["name"] for output in config["output"]] == outputs
    assert config["model_transaction_policy"] == {}
    assert [(m["name"], m["state"]) for m in seen["index"]] == [
        ("student", "READY"),
        ("teacher", "READY"),
    ]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("prompt", ["text", "ids"])
def test_infer_gives_what_generate_gives(
    seen: dict[str, Any], expected: Any, model: str, prompt: str
) -> None:
    outputs, sample = seen[prompt][model], expected[model]
    assert outputs["output_ids"] == list(sample.token_ids)
    assert outputs["text_output"] == sample.text
    assert outputs["logprobs"] == list(sample.logprobs)
    assert outputs["k3"] == pytest.approx(list(sample.divergence.per_token_k3))


def test_async_infer_gives_the_same_ids(seen: dict[str, Any], expected: Any) -> None:
    assert seen["async"]["output_ids"] == list(expected["student"].token_ids)


def test_streamed_parts_add_up_to_the_sample(seen: dict[str, Any], expected: Any) -> None:
    for model in MODELS:
        parts, sample = seen["stream"][model], expected[model]
        assert len(parts) > 2
        text = "".join(part.get("text_output", "") for part in parts)
        token_ids = [token_id for part in parts for token_id in part.get("output_ids", [])]
        assert (text, token_ids) == (sample.text, list(sample.token_ids))
    assert seen["stream"]["student"][-1]["output_ids"] == []
    assert seen["stream"]["teacher"][-1] == {}


def test_refused_request_names_its_field(seen: dict[str, Any]) -> None:
    code, text = seen["errors"]["unary"]
    assert code == "StatusCode.INVALID_ARGUMENT"
    assert text.startswith("parameters[beams]: is not known; must be one of temperature")
    assert seen["errors"]["stream"] == f"INVALID_ARGUMENT: {text}"
    assert seen["errors"]["next_text"]


def messages(file: descriptor_pb2.FileDescriptorProto) -> dict[str, Any]:
    """Messages by name, nested ones as "Outer.Inner"."""
    found = {}
    todo = [("", message) for message in file.message_type]
    while todo:
        prefix, message = todo.pop()
        found[prefix + message.name] = message
        todo += [(f"{prefix}{message.name}.", inner) for inner in message.nested_type]
    return found


def layout(fields: Any) -> list[tuple[Any, ...]]:
    return [(f.name, f.number, f.label, f.type, f.type_name, f.oneof_index) for f in fields]


def test_our_messages_are_a_part_of_theirs(seen: dict[str, Any]) -> None:
    files = [
        descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(data))
        for data in seen["descriptors"]
    ]
    theirs = {name: message for file in files for name, message in messages(file).items()}
    ours = descriptor_pb2.FileDescriptorProto()
    oip.DESCRIPTOR.CopyToProto(ours)
    assert (ours.name, ours.package) == (files[0].name, files[0].package)
    for name, message in messages(ours).items():
        assert set(layout(message.field)) <= set(layout(theirs[name].field)), name
    (our_rpcs,), (their_rpcs,) = ours.service, files[0].service
    shapes = {
        (m.name, m.input_type, m.client_streaming, m.server_streaming) for m in our_rpcs.method
    }
    assert shapes <= {
        (m.name, m.input_type, m.client_streaming, m.server_streaming) for m in their_rpcs.method
    }
    (data_type,) = [enum for enum in files[1].enum_type if enum.name == "DataType"]
    assert {(v.name, v.number) for v in ours.enum_type[0].value} <= {
        (v.name, v.number) for v in data_type.value
    }
