"""What is loaded for a config: models, device, and the teacher that nobody named."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import tandem.cli
from bundle.errors import UserError
from bundle.manifest import write_manifest
from serve.app.config import ServeConfig
from serve.app.loading import build_engines, choose_device
from serve.app.server import initial_policy
from serve.engine.engine import Engine
from serve.errors import DeviceMissingError
from serve.metrics.server_metrics import ServerMetrics
from serve.models.noise import NoiseFloor
from serve.pair.served import Role
from serve.rpc.credentials.tokens import new_token
from serve.rpc.replies import to_model
from tests.support.backends import save_byte_tokenizer
from tests.support.models.manifests import manifest_of
from tests.support.rpc.authorities import Pki


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A bundle with a tiny random Llama as its student; its ONNX graph is none."""
    folder = tmp_path_factory.mktemp("bundle")
    save_llama(folder / "student", tokenizer, tokenizer.num_tokens)
    (folder / "onnx" / "int8").mkdir(parents=True)
    (folder / "onnx" / "int8" / "model.onnx").write_text("not a graph")
    write_manifest(folder, manifest_of(folder, folder / "student"))
    return folder


def save_llama(folder: Path, tokenizer: Any, num_rows: int) -> Path:
    config = LlamaConfig(
        vocab_size=num_rows,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


def load(bundle: Path, **settings: Any) -> Any:
    settings = {"student_backend": "torch", "max_model_len": 64, "device": "cpu", **settings}
    metrics = ServerMetrics(CollectorRegistry())
    return build_engines(ServeConfig(bundle=bundle, **settings), metrics)


@pytest.fixture
def engine_settings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each engine is made with."""
    made: list[dict[str, Any]] = []

    class Noted(Engine):
        def __init__(self, backend: Any, **settings: Any) -> None:
            made.append(settings)
            super().__init__(backend, **settings)

    monkeypatch.setattr("serve.app.loading.Engine", Noted)
    return made


def test_bundle_and_teacher_become_two_engines(bundle: Path) -> None:
    engines = load(bundle, teacher=bundle / "student", teacher_dtype="float32", max_num_seqs=2)
    student, teacher = engines.loaded
    assert (student.role, teacher.role) == (Role.STUDENT, Role.TEACHER)
    assert student.engine.info.max_num_seqs == 2
    assert student.manifest_sha256 and not teacher.manifest_sha256
    assert teacher.tokenizer is student.tokenizer


def test_rows_behind_the_tokens_are_nowhere(bundle: Path, tmp_path: Path, tokenizer: Any) -> None:
    teacher = save_llama(tmp_path, tokenizer, 320)
    models = load(bundle, teacher=teacher, teacher_dtype="float32").loaded
    assert [model.engine.info.vocab_size for model in models] == [259, 259]


def test_tokens_without_a_row_are_warned_about(
    bundle: Path, tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    load(bundle, teacher=save_llama(tmp_path, tokenizer, 250))
    (warning,) = [r.getMessage() for r in caplog.records if "of 250 rows" in r.getMessage()]
    assert "ids up to 258, which is" in warning and "a token from 250 on are refused" in warning


def test_without_a_teacher_the_student_is_alone(bundle: Path) -> None:
    assert load(bundle).teacher is None


def test_noise_floor_is_measured_at_load_logged_and_published(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="serve.app.loading"):
        student = load(bundle).student
    assert 0 <= student.noise.path_nats < 1e-4 and 0 <= student.noise.batch_nats < 1e-4
    published = to_model(student)
    assert published.path_noise_nats == student.noise.path_nats
    assert published.batch_noise_nats == student.noise.batch_nats
    assert not published.HasField("backend_noise_nats")
    assert "student: torch float32 on cpu" in caplog.text
    assert "it scores in one pass" in caplog.text


@pytest.mark.parametrize(
    ("noise", "in_one_pass"), [(0.0, True), (1e-3, True), (2e-3, False), (float("nan"), False)]
)
def test_noisy_model_scores_by_forced_decoding(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine_settings: list[dict[str, Any]],
    noise: float,
    in_one_pass: bool,
) -> None:
    floor = NoiseFloor(path_nats=noise, batch_nats=0.0)
    monkeypatch.setattr("serve.app.loading.measure_noise_floor", lambda backend: floor)
    load(bundle)
    assert [made["scores_in_one_pass"] for made in engine_settings] == [in_one_pass]


def test_engines_get_the_settings(bundle: Path, engine_settings: list[dict[str, Any]]) -> None:
    load(bundle, max_pass_tokens=32, prefix_cache_mib=3, threads=1)
    (made,) = engine_settings
    assert made["max_pass_tokens"] == 32
    assert made["max_prefix_cache_bytes"] == 3 << 20
    assert made["num_torch_threads"] == 1


def test_teacher_alone_is_the_one_of_the_bundle_or_a_folder(bundle: Path) -> None:
    settings = {"no_student": True, "teacher_dtype": "float32"}
    for teacher in (load(bundle, teacher=bundle / "student", **settings), load_alone(bundle)):
        assert teacher.student is None and teacher.teacher is not None
        assert initial_policy(teacher, ServeConfig(bundle=bundle)).teacher_weight == 1


def load_alone(bundle: Path) -> Any:
    config = ServeConfig(
        teacher=bundle / "student", no_student=True, device="cpu", max_model_len=64
    )
    return build_engines(config, ServerMetrics(CollectorRegistry()))


# A remote teacher


@pytest.fixture
def teacher_address(serving: Any, make_pair: Any) -> Iterator[str]:
    with serving(make_pair(roles=(Role.TEACHER,))) as live:
        yield f"grpc://{live.server.address}"


def test_remote_teacher_is_looked_at(
    bundle: Path, teacher_address: str, caplog: pytest.LogCaptureFixture
) -> None:
    engines = load(bundle, teacher=teacher_address)
    assert engines.teacher.address == teacher_address
    assert engines.teacher.tokenizer is engines.student.tokenizer
    assert engines.local == (engines.student,)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "parameters, the one that the student was distilled from (tiny) has 1" in warning


def test_logits_of_other_tokens_of_a_remote_teacher_are_warned_about(
    bundle: Path, serving: Any, make_pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(make_pair(teacher=torch.zeros(320, 320), roles=(Role.TEACHER,))) as live:
        load(bundle, teacher=f"grpc://{live.server.address}")
    assert "has logits of 320 tokens, the student of 259" in caplog.text


def test_remote_teacher_may_come_later(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(bundle, teacher="grpc://127.0.0.1:1").teacher is not None
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("the teacher at grpc://127.0.0.1:1 does not answer (UNAVAILABLE")


def test_server_that_cannot_be_the_teacher_ends_the_start(
    bundle: Path, serving: Any, make_pair: Any
) -> None:
    with serving(make_pair(roles=(Role.STUDENT,))) as live:
        address = f"grpc://{live.server.address}"
        with pytest.raises(UserError, match=f"--teacher {address}: the server there has no teac"):
            load(bundle, teacher=address)


def test_remote_teacher_is_called_over_tls_with_a_token(
    bundle: Path, serving: Any, make_pair: Any, tmp_path: Path
) -> None:
    pki, (secret, sha256) = Pki(tmp_path), new_token()
    tokens, token = tmp_path / "tokens", tmp_path / "token"
    tokens.write_text(f"student {sha256} inference\n")
    token.write_text(secret)
    pair = make_pair(roles=(Role.TEACHER,))
    with serving(pair, auth_tokens=tokens, tls_cert=pki.cert, tls_key=pki.key) as live:
        address = f"grpcs://{live.server.address}"
        load(bundle, teacher=address, teacher_tls_ca=pki.client_ca, teacher_token_file=token)
    labels = {"rpc": "GetModels", "route": "none", "task": "other", "code": "OK"}
    assert pair.value("requests_total", **labels) == 1


def test_credentials_for_a_remote_teacher_must_be_there(bundle: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(UserError, match=r"--teacher-token-file .* cannot be read"):
        load(bundle, teacher="grpc://127.0.0.1:1", teacher_token_file=nowhere)
    with pytest.raises(UserError, match=r"--teacher grpcs://t:1: .*No such file"):
        load(bundle, teacher="grpcs://t:1", teacher_tls_ca=nowhere)


# Which device


@pytest.fixture
def set_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_cuda(*, torch_has: bool, onnx_has: bool) -> None:
        providers = ["CUDAExecutionProvider"] * onnx_has + ["CPUExecutionProvider"]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_has)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)

    return set_cuda


@pytest.mark.parametrize(
    ("asked", "torch_has", "onnx_has", "runtimes", "expected"),
    [
        ("cpu", True, True, {"torch", "onnx"}, "cpu"),
        ("auto", True, True, {"torch", "onnx"}, "cuda"),
        ("auto", True, False, {"torch", "onnx"}, "cpu"),
        ("auto", False, True, {"torch", "onnx"}, "cpu"),
        ("auto", False, True, {"onnx"}, "cpu"),
        ("auto", True, True, {"onnx"}, "cuda"),
        ("cuda", True, False, {"torch"}, "cuda"),
    ],
)
def test_device_is_one_that_every_runtime_can_use(
    set_cuda: Any, asked: Any, torch_has: bool, onnx_has: bool, runtimes: set[str], expected: str
) -> None:
    set_cuda(torch_has=torch_has, onnx_has=onnx_has)
    assert choose_device(asked, runtimes) == expected


@pytest.mark.parametrize(
    ("torch_has", "onnx_has", "runtimes", "text"),
    [
        (False, True, {"torch", "onnx"}, "torch finds no CUDA device"),
        (False, True, {"onnx"}, "torch finds no CUDA device"),
        (True, False, {"torch", "onnx"}, "has CPUExecutionProvider and not CUDA"),
    ],
)
def test_missing_cuda_is_no_reason_to_use_the_cpu(
    set_cuda: Any, torch_has: bool, onnx_has: bool, runtimes: set[str], text: str
) -> None:
    set_cuda(torch_has=torch_has, onnx_has=onnx_has)
    with pytest.raises(DeviceMissingError, match=text):
        choose_device("cuda", runtimes)


def test_missing_cuda_ends_the_command_with_3_and_one_line(
    bundle: Path, set_cuda: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    set_cuda(torch_has=False, onnx_has=False)
    words = ["serve", "--bundle", str(bundle), "--device", "cuda", "--no-teacher"]
    with pytest.raises(SystemExit) as caught:
        tandem.cli.main(words)
    assert caught.value.code == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("tandem: --device cuda: onnxruntime has")


# What cannot be served


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"student_backend": "onnx", "variant": "int2"}, "variant 'int2' is none of int8"),
        ({"max_model_len": 4096}, "max_model_len 4096 exceeds the 128"),
        ({"bundle": Path("/nowhere")}, "is not a bundle"),
    ],
)
def test_what_cannot_be_served_is_a_user_error(
    bundle: Path, settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=text):
        load(**{"bundle": bundle, **settings})


def drop_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def break_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% if")


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (drop_weights, "lacks weights, model.layers.1.mlp.up_proj.weight first"),
        (break_template, "teacher: the chat template does not compile in line 1: unexp"),
    ],
)
def test_model_that_is_damaged_is_refused_in_one_line(
    bundle: Path, tmp_path: Path, damage: Callable[[Path], object], text: str
) -> None:
    """Every damage: tests/bundle/test_model_folder.py, tests/serve/text/test_tokenizer_files.py."""
    folder = tmp_path / "teacher"
    shutil.copytree(bundle / "student", folder)
    damage(folder)
    with pytest.raises(UserError, match=text) as caught:
        load(bundle, teacher=folder)
    assert str(caught.value).isprintable()


def test_graph_that_is_none_is_refused_in_one_line(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(bundle / "student", folder)
    (folder / "model.onnx").write_text("not a graph")
    with pytest.raises(UserError, match=r"cannot load .*teacher: DecodeError: Error parsing"):
        load(bundle, teacher=folder, teacher_backend="onnx")
